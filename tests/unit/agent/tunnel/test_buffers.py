"""The account of buffered bytes: when a worker is full, and who has to give way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.tunnel.buffers import BUFFERS, FULL_SECONDS, HIGH_WATER, Buffers, Kept

if TYPE_CHECKING:
    from collections.abc import Callable


class Keeper:
    """Keeps bytes, and notes when it had to give up."""

    def __init__(self, scene: Scene, name: str, *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        self.partner: Keeper | None = None  # ends with it
        self.scene = scene
        self.name = name
        self.buffered = 0

    def keep(self, count: int) -> None:
        self.buffered += count
        self.scene.buffers.change(self, count)

    def give_up(self) -> None:
        self.scene.given_up.append(self.name)
        self.keep(-self.buffered)
        if self.partner is not None:
            self.partner.keep(-self.partner.buffered)


class Scene:
    """An account of 100 bytes, and what it did."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.told: list[object] = []
        self.given_up: list[str] = []
        self.buffers = Buffers()
        self.buffers.set_limit(100)
        self.buffers.call_later = lambda seconds, call: self.timers.append((seconds, call))
        self.buffers.on_full = lambda: self.told.append("full")
        self.buffers.on_relieved = self.told.append

    def is_full(self) -> bool:
        return self.buffers.is_full

    def keeper(self, name: str, count: int = 0, *, is_shared: bool = False) -> Keeper:
        made = Keeper(self, name, is_shared=is_shared)
        made.keep(count)
        return made


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_account_is_full_at_its_limit_until_a_quarter_is_free(scene: Scene) -> None:
    one, other = scene.keeper("one", 60), scene.keeper("other", 39)
    assert not scene.is_full()
    other.keep(1)
    assert (scene.buffers.is_full, scene.buffers.high_water) == (True, 0)
    one.keep(-24)
    assert scene.is_full()
    one.keep(20)
    one.keep(-21)
    assert (scene.buffers.is_full, scene.buffers.high_water) == (False, HIGH_WATER)
    assert scene.buffers.held == 75
    assert scene.told == ["full"]


def test_who_waits_for_room_is_called_once(scene: Scene) -> None:
    calls: list[str] = []
    only = scene.keeper("only", 100)

    def on_room() -> None:
        calls.append("room")

    scene.buffers.wait_room(on_room)
    scene.buffers.wait_room(on_room)
    only.keep(-10)
    assert calls == []
    only.keep(-90)
    assert calls == ["room"]
    only.keep(100)
    only.keep(-100)
    assert calls == ["room"]


def test_those_that_moved_nothing_give_up_first_and_the_largest_of_them(scene: Scene) -> None:
    moving = scene.keeper("moving", 60)
    scene.keeper("small", 10)
    scene.keeper("large", 30)
    moving.keep(-2)
    ((seconds, relieve),) = scene.timers
    assert seconds == FULL_SECONDS
    relieve()
    assert scene.given_up == ["large"]  # which was enough
    assert scene.told == ["full", 1]
    assert not scene.is_full()


def test_what_several_connections_share_is_kept_as_long_as_single_ones_are_enough(
    scene: Scene,
) -> None:
    moving = scene.keeper("moving", 15)
    scene.keeper("tunnel", 45, is_shared=True)
    scene.keeper("single", 40)
    moving.keep(-1)
    moving.keep(1)
    scene.timers[0][1]()
    assert scene.given_up == ["single"]
    scene.keeper("heavy", 90, is_shared=True)
    scene.timers[1][1]()
    assert scene.given_up == ["single", "moving", "heavy"]


def test_those_that_move_too_little_give_up_in_the_end(scene: Scene) -> None:
    keepers = [scene.keeper(name, size) for name, size in (("a", 30), ("b", 40), ("c", 30))]
    for keeper in keepers:
        keeper.keep(-1)
    scene.timers[0][1]()
    assert scene.given_up == ["b"]


def test_who_ended_with_another_one_is_not_asked_again(scene: Scene) -> None:
    both = scene.keeper("left", 45), scene.keeper("right", 44)
    scene.keeper("other", 80, is_shared=True)
    for one, other in (both, both[::-1]):
        one.partner = other
    scene.timers[0][1]()
    assert scene.given_up == ["left", "other"]
    assert scene.told == ["full", 2]


def test_nobody_gives_up_for_what_is_over(scene: Scene) -> None:
    only = scene.keeper("only", 100)
    only.keep(-50)
    only.keep(50)  # full once more: this time has a deadline of its own
    first, second = (call for _seconds, call in scene.timers)
    first()
    assert scene.given_up == []
    second()
    assert scene.given_up == ["only"]
    second()
    assert scene.told == ["full", "full", 1]


def test_account_without_a_clock_or_a_limit_still_counts() -> None:
    scene = Scene()
    scene.buffers = Buffers()
    keeper = scene.keeper("one", 1 << 40)
    assert not scene.is_full()
    scene.buffers.set_limit(10)
    keeper.keep(1)
    assert scene.is_full()
    scene.buffers.on_relieved(1)
    keeper.keep(-keeper.buffered)
    assert scene.buffers.held == 0


def test_bytes_that_wait_for_somebody_are_in_the_account_until_they_are_taken() -> None:
    ended: list[str] = []
    before = BUFFERS.held
    kept = Kept(lambda: ended.append("ended"))
    kept.keep(memoryview(b"one "))
    kept.keep(b"two")
    assert BUFFERS.held == before + 7
    assert kept.take() == [b"one ", b"two"]
    assert (BUFFERS.held, kept.take(), ended) == (before, [], [])
    kept.keep(b"three")
    kept.give_up()
    assert (BUFFERS.held, kept.take(), ended) == (before, [], ["ended"])

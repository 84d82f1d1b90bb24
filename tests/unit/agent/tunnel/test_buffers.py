"""The account of buffered bytes: when a pod is full, and who has to give way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.tunnel.buffers import (
    BUFFERS,
    FULL_SECONDS,
    HIGH_WATER,
    JOINED_BYTES,
    Backlog,
    Buffers,
    Kept,
    Share,
)
from tests.support.allocated import allocated

if TYPE_CHECKING:
    from collections.abc import Callable


class Keeper:
    """Keeps bytes, by the high water, and notes when it had to give up."""

    def __init__(self, scene: Scene, share: Share, name: str, *, is_shared: bool = False) -> None:
        self.share = share
        self.is_shared = is_shared
        self.partner: Keeper | None = None  # ends with it
        self.scene = scene
        self.name = name
        self.buffered = 0

    def keep(self, count: int) -> None:
        self.buffered += count * HIGH_WATER
        self.share.change(self, count * HIGH_WATER)

    def give_up(self) -> None:
        self.scene.given_up.append(self.name)
        self.release()
        if self.partner is not None:
            self.partner.release()

    def release(self) -> None:
        self.keep(-self.buffered // HIGH_WATER)


class Scene:
    """An account of 400 times the high water, so 100 for a pod, and what it did."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.told: list[object] = []
        self.given_up: list[str] = []
        self.buffers = Buffers()
        self.buffers.set_limit(400 * HIGH_WATER)
        self.buffers.call_later = lambda seconds, call: self.timers.append((seconds, call))
        self.buffers.on_full = self.told.append
        self.buffers.on_relieved = lambda pod, count: self.told.append((pod, count))
        self.share = self.new_share("pod")

    def new_share(self, pod: str) -> Share:
        return Share(pod, self.buffers)

    def is_full(self) -> bool:
        return self.share.is_full

    def keeper(self, name: str, count: int, *, is_shared: bool = False) -> Keeper:
        return keep(self, self.share, name, count, is_shared=is_shared)


def keep(scene: Scene, share: Share, name: str, count: int, *, is_shared: bool = False) -> Keeper:
    made = Keeper(scene, share, name, is_shared=is_shared)
    made.keep(count)
    return made


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_pod_is_full_at_its_part_until_a_quarter_of_that_is_free(scene: Scene) -> None:
    one, other = scene.keeper("one", 60), scene.keeper("other", 39)
    assert not scene.is_full()
    other.keep(1)
    assert (scene.share.is_full, scene.share.high_water) == (True, 0)
    one.keep(-24)
    assert scene.is_full()
    one.keep(20)
    one.keep(-21)
    assert (scene.share.is_full, scene.share.high_water) == (False, HIGH_WATER)
    assert scene.buffers.held == scene.share.held == 75 * HIGH_WATER
    assert scene.told == ["pod"]


def test_two_full_pods_are_nothing_to_a_third(scene: Scene) -> None:
    third = scene.keeper("third", 99)
    full = [scene.new_share(f"full-{number}") for number in range(2)]
    for share in full:
        keep(scene, share, "only", 100)
    assert all(share.is_full for share in full)
    assert not scene.is_full()
    third.keep(1)
    assert scene.is_full()


def test_pod_that_takes_more_than_is_free_is_full_itself_and_a_smaller_one_is_not(
    scene: Scene,
) -> None:
    shares = [scene.new_share(f"full-{number}") for number in range(6)]
    keepers = [keep(scene, share, "only", 0) for share in shares]
    while not all(share.is_full for share in shares):
        for share, keeper in zip(shares, keepers, strict=True):
            if not share.is_full:
                keeper.keep(1)
    assert [share.held // HIGH_WATER for share in shares] == [58, 57, 57, 57, 57, 57]
    victim = scene.keeper("victim", 28)
    assert not scene.is_full()
    victim.keep(1)
    assert scene.is_full()


def test_pod_that_others_made_full_has_room_when_they_have_passed_on(scene: Scene) -> None:
    calls: list[str] = []
    scene.keeper("mine", 70)
    others = [keep(scene, scene.new_share(f"other-{number}"), "it", 99) for number in range(3)]
    assert scene.is_full()  # 33 are free
    scene.share.wait_room(lambda: calls.append("room"))
    others[0].keep(-9)
    assert scene.is_full()
    others[0].release()
    assert not scene.is_full()
    assert calls == ["room"]


def test_pod_with_less_than_the_high_water_is_not_full_when_nothing_is_left(scene: Scene) -> None:
    for number in range(5):
        keep(scene, scene.new_share(f"other-{number}"), "it", 99)
    victim = scene.keeper("victim", 0)
    victim.buffered = HIGH_WATER - 1
    scene.share.change(victim, victim.buffered)
    assert not scene.is_full()
    victim.buffered += 1
    scene.share.change(victim, 1)
    assert scene.is_full()


def test_who_waits_for_room_is_called_once(scene: Scene) -> None:
    calls: list[str] = []
    only = scene.keeper("only", 100)

    def on_room() -> None:
        calls.append("room")

    scene.share.wait_room(on_room)
    scene.share.wait_room(on_room)
    only.keep(-10)
    assert calls == []
    only.keep(-90)
    assert calls == ["room"]
    only.keep(100)
    only.keep(-100)
    assert calls == ["room"]


def test_all_those_that_moved_nothing_give_up_the_largest_first(scene: Scene) -> None:
    moving = scene.keeper("moving", 60)
    scene.keeper("small", 10)
    scene.keeper("large", 30)
    moving.keep(-2)
    ((seconds, relieve),) = scene.timers
    assert seconds == FULL_SECONDS
    relieve()
    assert scene.given_up == ["large", "small"]
    assert scene.told == ["pod", ("pod", 2)]
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
    assert scene.told == ["pod", ("pod", 2)]


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
    assert scene.told == ["pod", "pod", ("pod", 1)]


def test_account_without_a_clock_or_a_limit_still_counts() -> None:
    scene = Scene()
    scene.buffers = Buffers()
    scene.share = scene.new_share("pod")
    keeper = scene.keeper("one", 1 << 24)
    assert not scene.is_full()
    scene.buffers.set_limit(10)
    keeper.keep(1)
    assert scene.is_full()
    scene.buffers.on_relieved("pod", 1)
    keeper.release()
    assert not scene.is_full()
    assert scene.buffers.held == 0


def test_bytes_that_wait_for_somebody_are_in_the_account_until_they_are_taken() -> None:
    ended: list[str] = []
    before = BUFFERS.held
    kept = Kept(Share("shop/server-0"), lambda: ended.append("ended"))
    kept.keep(memoryview(b"one "))
    kept.keep(b"two")
    assert BUFFERS.held == before + 7
    assert kept.take() == [b"one two"]
    assert (BUFFERS.held, kept.take(), ended) == (before, [], [])


def test_bytes_that_nobody_will_take_end_their_connection_once() -> None:
    ended: list[str] = []
    before = BUFFERS.held
    kept = Kept(Share("shop/server-0"), lambda: ended.append("ended"))
    kept.keep(b"three")
    kept.give_up()
    assert (BUFFERS.held, kept.take(), ended) == (before, [], ["ended"])
    kept.give_up()
    assert ended == ["ended"]


def test_small_pieces_cost_little_more_than_is_in_them() -> None:
    kept = Kept(Share("shop/server-0"), lambda: None)

    def keep() -> None:
        for _ in range(60_000):
            kept.keep(b"k")

    assert allocated(keep) < kept.buffered * 1.5
    kept.take()


def test_backlog_is_passed_on_in_order_while_what_was_taken_of_it_is_still_in_use() -> None:
    backlog = Backlog()
    taken: list[memoryview] = []
    for number in range(1000):
        backlog.keep(b"%d " % number)
        view = memoryview(backlog[0])
        size = min(len(view), 1 + number % 5)
        taken.append(view[:size])
        backlog.pass_on(size)
    taken += [memoryview(piece) for piece in backlog]
    assert b"".join(taken) == b"".join(b"%d " % number for number in range(1000))


def test_pieces_are_joined_while_they_are_small() -> None:
    backlog = Backlog()
    for size in (1, JOINED_BYTES - 1, 1, 2):
        backlog.keep(bytes(size))
    assert [len(piece) for piece in backlog] == [JOINED_BYTES, 3]
    backlog.pass_on(JOINED_BYTES)
    assert [len(piece) for piece in backlog] == [3]


def test_rest_of_a_large_piece_does_not_hold_all_of_it() -> None:
    backlog = Backlog()

    def keep_rest() -> None:
        backlog.keep(bytes(1 << 20))
        while len(backlog[0]) > 1:
            backlog.pass_on((len(backlog[0]) + 1) // 3)

    assert allocated(keep_rest) < 1000
    assert [len(piece) for piece in backlog] == [1]

"""Run a worker's reactor in a test: until something is so, or for a number of rounds or seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import select
    from collections.abc import Callable

    from agent.tunnel.reactor import Reactor

PATIENCE_SECONDS = 10.0


def run_until(reactor: Reactor, condition: Callable[[], object]) -> None:
    """Run until `condition()` holds; it is asked after every round (AssertionError if never)."""
    too_late: list[bool] = []
    limit = reactor.call_later(PATIENCE_SECONDS, lambda: too_late.append(True))

    def ask() -> None:
        if condition() or too_late:
            reactor.stop()
        else:
            reactor.call_soon(ask)

    reactor.call_soon(ask)
    reactor.run()
    limit.cancel()
    assert not too_late, "it never happened"


def run_rounds(reactor: Reactor, count: int) -> None:
    """Run a number of rounds, none of which waits."""
    left = [count]

    def count_down() -> bool:
        left[0] -= 1
        return left[0] <= 0

    run_until(reactor, count_down)


class _CountedEpoll:
    """An epoll that counts how often it was asked."""

    def __init__(self, own: select.epoll) -> None:
        self._own = own
        self.rounds = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def poll(self, patience: float, most: int) -> list[tuple[int, int]]:
        self.rounds += 1
        return self._own.poll(patience, most)


def count_rounds(reactor: Reactor, seconds: float) -> int:
    """Run for so long, and return how many rounds it took: a few if the loop was at rest."""
    own = reactor._epoll
    counted = _CountedEpoll(own)
    reactor._epoll = counted  # type: ignore[assignment]  # has all that is asked of it
    reactor.call_later(seconds, reactor.stop)
    reactor.run()
    reactor._epoll = own
    return counted.rounds

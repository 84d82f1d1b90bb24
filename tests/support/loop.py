"""Run a worker's reactor in a test: until something is so, or for a number of rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

"""So many lines a second, and a count of the others."""

from __future__ import annotations

from agent.tunnel.limiter import Limiter


def test_a_second_has_its_lines_and_the_rest_is_counted() -> None:
    limiter = Limiter(3)
    assert [limiter.may_pass(100.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert limiter.take_suppressed() == 2
    assert limiter.take_suppressed() == 0
    assert [limiter.may_pass(100.4) for _ in range(2)] == [True, False]
    # However long it was quiet, no more than a second's worth is saved.
    assert [limiter.may_pass(900.0) for _ in range(4)] == [True] * 3 + [False]


def test_without_a_limit_all_pass() -> None:
    limiter = Limiter(0)
    assert all(limiter.may_pass(0.0) for _ in range(1000))
    assert limiter.take_suppressed() == 0

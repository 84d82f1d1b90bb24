"""Which of several objects is the oldest."""

from __future__ import annotations

from agent.model.age import age


def test_oldest_comes_first_and_what_tells_no_age_last() -> None:
    old, young = "2025-12-31T23:59:59Z", "2026-01-01T00:00:00Z"
    assert sorted(["", young, old], key=age) == [old, young, ""]

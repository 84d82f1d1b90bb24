"""What differs between two sets of entries."""

from __future__ import annotations

from agent.state.drift import Drift, compare


def test_missing_changed_and_surplus_entries_are_told_apart() -> None:
    expected = {"a": 1, "b": 2, "c": 3}
    observed = {"d": 4, "b": 9, "c": 3}
    assert compare(expected, observed) == [
        Drift("a", 1, None),
        Drift("b", 2, 9),
        Drift("d", None, 4),
    ]
    assert compare(expected, expected) == []

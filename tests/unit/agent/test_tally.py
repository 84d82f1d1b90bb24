"""Sums by labels, and series that are forgotten."""

from __future__ import annotations

from agent.tally import Tally

A, B = (("pod", "a"),), (("pod", "b"),)


def test_amounts_are_summed_by_name_and_labels() -> None:
    tally = Tally()
    tally.add((("bytes", A, 3), ("bytes", B, 1), ("connections", A, 1)), 0.0)
    tally.add((("bytes", A, 4),), 1.0)
    assert dict(tally.of("bytes")) == {A: 7, B: 1}
    assert dict(tally.of("connections")) == {A: 1}
    assert dict(tally.of("nothing")) == {}


def test_all_is_taken_once() -> None:
    tally = Tally()
    tally.add((("bytes", A, 3), ("connections", B, 1)), 10.0)
    taken = tally.take()
    assert taken == (("bytes", A, 3), ("connections", B, 1))
    assert tally.take() == ()
    tally.add((*taken, ("bytes", A, 4)), 20.0)
    assert tally.expire(30.0, lambda _labels: True) == 2


def test_only_what_is_gone_and_has_not_changed_is_forgotten() -> None:
    tally = Tally()
    tally.add((("bytes", A, 3), ("bytes", B, 1)), 10.0)
    assert tally.expire(10.0, lambda _labels: True) == 0
    tally.add((("bytes", B, 1),), 20.0)
    assert tally.expire(15.0, lambda _labels: False) == 0
    assert tally.expire(15.0, lambda _labels: True) == 1
    assert dict(tally.of("bytes")) == {B: 2}
    tally.add((("bytes", A, 5),), 30.0)
    assert dict(tally.of("bytes")) == {A: 5, B: 2}

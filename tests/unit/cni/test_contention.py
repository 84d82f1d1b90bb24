"""How long the entry is put back against somebody who takes it away."""

from __future__ import annotations

from cni.contention import MOST_STRIKES, TRUCE_SECONDS, WINDOW_SECONDS, Contention


def test_first_strike_is_answered_at_once_and_each_more_later() -> None:
    contention = Contention()
    waits = [contention.strike(float(number)) for number in range(MOST_STRIKES)]
    known = [wait for wait in waits if wait is not None]
    assert known[0] == 0.0
    assert len(known) == MOST_STRIKES
    assert known == sorted(known)
    assert len(set(known)) == MOST_STRIKES
    assert contention.strikes == MOST_STRIKES


def test_strikes_are_forgotten_with_time() -> None:
    contention = Contention()
    for number in range(100):
        assert contention.strike(number * WINDOW_SECONDS) == 0.0
    assert contention.gave_up_at is None


def test_fight_is_given_up_after_the_bound_and_taken_up_after_the_truce() -> None:
    contention = Contention()
    for _ in range(MOST_STRIKES):
        contention.strike(10.0)
    assert contention.strike(10.0) is None
    assert contention.gave_up_at == 10.0
    assert contention.strike(10.0 + TRUCE_SECONDS - 1) is None
    assert contention.gave_up_at == 10.0
    assert contention.strike(10.0 + TRUCE_SECONDS) == 0.0
    assert contention.gave_up_at is None

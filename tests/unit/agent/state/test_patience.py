"""Who mends what others take away has patience, and an end of it."""

from __future__ import annotations

from agent.state.patience import (
    FREE_TRIES,
    LONGEST_WAIT_SECONDS,
    TRUCE_SECONDS,
    Patience,
)


def test_first_times_are_mended_at_once() -> None:
    patience = Patience[str]()
    for now in range(FREE_TRIES):
        assert patience.is_due("link", now)
        patience.note("link", now)
    assert patience.contested(FREE_TRIES) == {}
    assert patience.is_due("link", FREE_TRIES)


def test_each_time_after_that_waits_longer_up_to_a_bound() -> None:
    patience = Patience[str]()
    now, waits = 0.0, []
    for _ in range(FREE_TRIES + 30):
        patience.note("link", now)
        wait = 0.0
        while not patience.is_due("link", now + wait):
            wait += 1
        waits.append(wait)
        now += wait
    assert waits[FREE_TRIES - 1 : FREE_TRIES + 3] == [0, 2, 4, 8]
    assert set(waits[-20:]) == {LONGEST_WAIT_SECONDS}
    assert patience.contested(now) == {"link": FREE_TRIES + 30}


def test_one_thing_does_not_make_another_wait() -> None:
    patience = Patience[str]()
    for _ in range(FREE_TRIES + 1):
        patience.note("link", 0)
    assert not patience.is_due("link", 1)
    assert patience.is_due("pin", 1)


def test_what_has_held_for_a_while_is_forgotten() -> None:
    patience = Patience[str]()
    for _ in range(FREE_TRIES + 1):
        patience.note("link", 0)
    assert patience.contested(TRUCE_SECONDS) == {"link": FREE_TRIES + 1}
    assert patience.contested(TRUCE_SECONDS + 1) == {}
    assert patience.is_due("link", TRUCE_SECONDS + 1)


def test_a_row_that_was_interrupted_begins_anew() -> None:
    patience = Patience[str]()
    for _ in range(FREE_TRIES + 1):
        patience.note("link", 0)
    patience.note("link", TRUCE_SECONDS + 1)
    assert patience.is_due("link", TRUCE_SECONDS + 1)
    assert patience.contested(TRUCE_SECONDS + 1) == {}

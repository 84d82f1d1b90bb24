"""When which certificate is asked for: no clock, no network."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.identity.rotation import (
    BACK_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    MOST_IN_FLIGHT,
    Rotation,
    Urgency,
)
from agent.model.identity import SpiffeId

DAY = 86400.0


def middle() -> float:
    return 0.5


def identity(name: str | int) -> SpiffeId:
    return SpiffeId("cluster.local", "shop", str(name))


A, B, C = identity("a"), identity("b"), identity("c")


def test_one_request_however_many_ask() -> None:
    rotation = Rotation(middle)
    for _ in range(5):
        rotation.want(A, Urgency.PREFETCH, 0)
        rotation.want(A, Urgency.WAITING, 0)
    assert rotation.take(0) == [A]
    rotation.want(A, Urgency.WAITING, 1)
    assert rotation.take(1) == []


def test_a_waiting_connection_goes_before_prefetch_and_that_before_renewal() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    assert rotation.take(0) == [A]
    rotation.on_issued(A, 100, 0)
    rotation.want(B, Urgency.PREFETCH, 50)
    rotation.want(C, Urgency.WAITING, 60)
    assert rotation.take(60) == [C, B, A]


def test_a_connection_raises_a_prefetch() -> None:
    rotation = Rotation(middle)
    names = [identity(number) for number in range(MOST_IN_FLIGHT + 2)]
    for name in names:
        rotation.want(name, Urgency.PREFETCH, 0)
    rotation.want(names[-1], Urgency.WAITING, 1)
    taken = rotation.take(1)
    assert taken == [names[-1], *names[: MOST_IN_FLIGHT - 1]]
    assert rotation.next_due() is None  # only an answer makes room
    rotation.on_issued(taken[0], DAY, 2)
    assert rotation.take(2) == [names[MOST_IN_FLIGHT - 1]]


@pytest.mark.parametrize(("number", "due"), [(0.0, 450), (0.5, 500), (1.0, 550)])
def test_renewal_is_due_at_half_of_the_rest_with_jitter(number: float, due: float) -> None:
    rotation = Rotation(lambda: number)
    rotation.want(A, Urgency.PREFETCH, 0)
    rotation.take(0)
    assert rotation.on_issued(A, 1000, 0)
    assert rotation.next_due() == pytest.approx(due)
    assert rotation.take(due - 0.1) == []
    assert rotation.take(due + 0.1) == [A]


def test_backoff_doubles_up_to_its_limit() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    now, waits = 0.0, []
    for _ in range(12):
        assert rotation.take(now) == [A]
        rotation.on_failed(A, "authority_unavailable", "away", now)
        due = rotation.next_due()
        assert due is not None
        waits.append(due - now)
        now = due
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 150, 150, 150]


def test_asking_again_does_not_shorten_the_backoff() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    rotation.take(0)
    rotation.on_failed(A, "authority_unavailable", "away", 0)
    rotation.want(A, Urgency.WAITING, 0.1)
    assert rotation.take(0.1) == []


def test_a_success_ends_the_wait_of_those_that_got_no_answer() -> None:
    rotation = Rotation(middle)
    for name in (A, B, C):
        rotation.want(name, Urgency.PREFETCH, 0)
    rotation.take(0)
    now = 0.0
    for _ in range(9):
        rotation.on_failed(A, "authority_unavailable", "away", now)
        rotation.on_failed(B, "authority_refused", "no such pod", now)
    rotation.on_issued(C, DAY, 1)
    assert rotation.take(1) == [A]  # B was answered: it waits its time


def test_the_old_certificate_stays_while_it_is_valid_and_is_tried_in_time() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    rotation.take(0)
    rotation.on_issued(A, 100, 0)
    now = 50.0
    attempts = 0
    while now < 100:
        if rotation.take(now):
            attempts += 1
            rotation.on_failed(A, "authority_unavailable", "away", now)
        assert rotation.entries[A].state(now) == "Available"
        due = rotation.next_due()
        assert due is not None
        now = due
    assert attempts > 5
    assert rotation.entries[A].state(100) == "Unavailable: authority_unavailable"


def test_an_answer_for_a_forgotten_identity_is_dropped() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    rotation.take(0)
    rotation.forget(A)
    assert not rotation.on_issued(A, DAY, 1)
    assert rotation.next_due() is None
    rotation.want(A, Urgency.PREFETCH, 2)
    rotation.take(2)
    rotation.forget(A)
    rotation.on_failed(A, "authority_unavailable", "away", 3)
    assert rotation.entries == {}


def test_forgotten_and_wanted_again_is_still_one_request() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    rotation.take(0)
    rotation.forget(A)
    rotation.want(A, Urgency.PREFETCH, 1)
    assert rotation.take(1) == []
    assert rotation.on_issued(A, DAY, 2)
    assert rotation.take(3) == []


def test_an_ended_certificate_makes_a_connection_urgent_again() -> None:
    rotation = Rotation(middle)
    rotation.want(A, Urgency.PREFETCH, 0)
    rotation.take(0)
    rotation.on_issued(A, 10, 0)
    rotation.want(A, Urgency.WAITING, 4)
    assert rotation.entries[A].urgency is Urgency.RENEWAL
    rotation.want(A, Urgency.WAITING, 11)
    assert rotation.entries[A].urgency is Urgency.WAITING


def test_a_clock_that_was_set_back_makes_all_due_that_was_decided_before() -> None:
    rotation = Rotation(middle)
    for name in (A, B):
        rotation.want(name, Urgency.PREFETCH, 2 * DAY)
    rotation.take(2 * DAY)
    rotation.on_issued(A, 3 * DAY, 2 * DAY)
    rotation.on_failed(B, "authority_refused", "no such pod", 2 * DAY)
    assert rotation.take(2 * DAY - BACK_SECONDS) == []  # what is so small is no jump
    assert rotation.take(DAY) == [B, A]
    rotation.on_issued(A, 2 * DAY, DAY)
    rotation.on_failed(B, "authority_refused", "no such pod", DAY)
    assert rotation.take(DAY) == []


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["want", "wait", "forget", "issue", "fail", "pass"]), st.integers(0, 19)
    ),
    max_size=200,
)


@given(OPERATIONS, st.integers(0, 2**32))
def test_any_order_of_events_keeps_the_rules(operations: list[tuple[str, int]], seed: int) -> None:
    rotation = Rotation(random.Random(seed).random)
    now = 0.0
    in_flight: list[SpiffeId] = []
    for kind, number in operations:
        name = identity(number)
        match kind:
            case "want":
                rotation.want(name, Urgency.PREFETCH, now)
            case "wait":
                rotation.want(name, Urgency.WAITING, now)
            case "forget":
                rotation.forget(name)
            case "issue" if in_flight:
                rotation.on_issued(in_flight.pop(number % len(in_flight)), now + 100, now)
            case "fail" if in_flight:
                rotation.on_failed(in_flight.pop(number % len(in_flight)), "x", "y", now)
            case _:
                now += number
        in_flight += rotation.take(now)
        assert len(in_flight) == len(set(in_flight)) <= MOST_IN_FLIGHT
        due = rotation.next_due()
        if due is not None:
            assert now < due <= now + max(LONGEST_BACKOFF_SECONDS, 100)

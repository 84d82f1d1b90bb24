"""How often a problem is said: once, then how often; and never a flood."""

from __future__ import annotations

from agent.discovery.occurrences import (
    BURST_WRITES,
    FINISHED_SECONDS,
    MOST_SERIES,
    SECONDS_PER_WRITE,
    Occurrence,
    Occurrences,
)


def problem(note: str = "no", pod: str = "cart-0") -> Occurrence:
    return Occurrence("shop", pod, f"uid-{pod}", "EnrollFailed", note)


def write_all(occurrences: Occurrences, now: float) -> list[tuple[str, int]]:
    """Write what may be written, and return its notes and counts."""
    found = []
    while (series := occurrences.due(now)) is not None:
        found.append((series.what.note, series.count))
        occurrences.wrote(series, series.count)
    return found


def test_problem_is_written_once_and_then_its_count() -> None:
    occurrences = Occurrences()
    assert occurrences.due(0.0) is None
    assert occurrences.next_due(0.0) is None
    occurrences.add(problem(), 0.0)
    assert occurrences.next_due(0.0) == 0.0
    assert write_all(occurrences, 0.0) == [("no", 1)]
    occurrences.add(problem(), 1.0)
    occurrences.add(problem(), 2.0)
    series = occurrences.due(2.0)
    assert series is not None
    assert (series.first, series.last, series.count, series.written) == (0.0, 2.0, 3, 1)
    assert write_all(occurrences, 2.0) == [("no", 3)]


def test_what_came_while_a_write_was_under_way_is_written_next() -> None:
    occurrences = Occurrences()
    occurrences.add(problem(), 0.0)
    series = occurrences.due(0.0)
    assert series is not None
    occurrences.add(problem(), 0.1)
    occurrences.wrote(series, 1)
    assert write_all(occurrences, 0.2) == [("no", 2)]


def test_different_notes_and_pods_are_different_problems() -> None:
    occurrences = Occurrences()
    for what in (problem(), problem("never"), problem(pod="cart-1")):
        occurrences.add(what, 0.0)
    assert write_all(occurrences, 0.0) == [("no", 1), ("never", 1), ("no", 1)]


def test_pod_that_fails_all_the_time_is_written_of_ever_more_rarely() -> None:
    occurrences = Occurrences()
    writes = []
    for second in range(3600):
        occurrences.add(problem(), float(second))
        writes += write_all(occurrences, float(second))
    assert BURST_WRITES < len(writes) <= BURST_WRITES + 3600 / SECONDS_PER_WRITE
    assert writes[-1][1] > 3300


def test_messages_that_always_change_are_no_flood_and_harm_no_other_pod() -> None:
    occurrences = Occurrences()
    for number in range(100):
        occurrences.add(problem(str(number)), 0.0)
    assert len(write_all(occurrences, 0.0)) == BURST_WRITES
    wait = occurrences.next_due(0.0)
    assert wait is not None
    assert 0.0 < wait <= SECONDS_PER_WRITE
    occurrences.add(problem(pod="other"), 0.0)
    assert write_all(occurrences, 0.0) == [("no", 1)]
    assert len(write_all(occurrences, wait + 0.001)) == 1


def test_problem_that_comes_back_after_a_while_is_a_new_one() -> None:
    occurrences = Occurrences()
    occurrences.add(problem(), 0.0)
    write_all(occurrences, 0.0)
    occurrences.add(problem(), FINISHED_SECONDS + 1.0)
    assert write_all(occurrences, FINISHED_SECONDS + 1.0) == [("no", 1)]


def test_problem_that_is_over_is_forgotten() -> None:
    occurrences = Occurrences()
    occurrences.add(problem(), 0.0)
    write_all(occurrences, 0.0)
    later = BURST_WRITES * SECONDS_PER_WRITE + 1.0
    occurrences.add(problem(pod="other"), later)
    assert list(occurrences._series) == [problem(pod="other")]
    assert list(occurrences._budgets) == ["uid-other"]


def test_no_number_of_problems_fills_the_memory() -> None:
    occurrences = Occurrences()
    for number in range(2 * MOST_SERIES):
        occurrences.add(problem(pod=f"pod-{number}"), 0.0)
    assert len(occurrences._series) == len(occurrences._budgets) == MOST_SERIES
    series = occurrences.due(0.0)
    assert series is not None
    assert series.what.pod == f"pod-{MOST_SERIES}"
    for number in range(MOST_SERIES):
        occurrences.add(problem(pod=f"pod-{number}"), 0.0)
    occurrences.wrote(series, 1)  # it was forgotten meanwhile

"""What a worker counts, until it is taken."""

from __future__ import annotations

from agent.tunnel.counts import Counts


def test_counts_are_summed_by_labels_and_forgotten_when_taken() -> None:
    counts = Counts()
    counts.add("bytes", 3, path="hbone", direction="inbound")
    counts.add("bytes", 4, direction="inbound", path="hbone")
    counts.add("bytes", 1, direction="outbound", path="hbone")
    taken = counts.take()
    assert sorted(taken) == [
        ("bytes", (("direction", "inbound"), ("path", "hbone")), 7),
        ("bytes", (("direction", "outbound"), ("path", "hbone")), 1),
    ]
    assert counts.take() == ()


def test_first_count_after_a_take_is_told() -> None:
    told = []
    counts = Counts()
    counts.on_first = lambda: told.append(True)
    counts.add("a")
    counts.add("a")
    assert len(told) == 1
    counts.take()
    counts.add("a")
    assert len(told) == 2

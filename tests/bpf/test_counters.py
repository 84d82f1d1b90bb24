"""Rows of ss_counters: each guarded link has one of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from agent.datapath.counters import OUTCOME_COUNT, Count, give_row, read_counts
from agent.model.pod import LocalPod

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath.maps import Map
    from agent.datapath.pins import Pins

pytestmark = pytest.mark.root

POD = LocalPod("uid", "shop", "cart", "cart", ())
COOKIE = 7
FIRST_LINK = 1_000_000  # no interface of this machine has such a number
FRAGMENTS_INBOUND = OUTCOME_COUNT + 3


@pytest.fixture
def maps(loaded: Pins) -> Iterator[tuple[Map, Map]]:
    guards, counters = loaded.maps["ss_guards"], loaded.maps["ss_counters"]
    yield guards, counters
    for key, _value in list(guards.items()):
        guards.delete(key)


def test_link_keeps_its_row_and_what_was_counted(maps: tuple[Map, Map]) -> None:
    guards, counters = maps
    row = give_row(guards, counters, POD, COOKIE, FIRST_LINK)
    counters.put(
        {"value": row * 2 * OUTCOME_COUNT + FRAGMENTS_INBOUND}, {"packets": 3, "bytes": 99}
    )
    assert give_row(guards, counters, POD, COOKIE, FIRST_LINK) == row
    (count,) = read_counts(guards, counters)
    # What is put is put for each processor, what is read is the sum.
    processors = count.packets // 3
    assert count == Count(COOKIE, FIRST_LINK, 1, 3, 3 * processors, 99 * processors)


def test_row_that_is_given_again_begins_at_zero(maps: tuple[Map, Map]) -> None:
    guards, counters = maps
    row = give_row(guards, counters, POD, COOKIE, FIRST_LINK)
    for outcome in range(2 * OUTCOME_COUNT):
        counters.put({"value": row * 2 * OUTCOME_COUNT + outcome}, {"packets": 3, "bytes": 99})
    assert len(list(read_counts(guards, counters))) == 2 * OUTCOME_COUNT
    # The interface's number is another pod's now.
    assert give_row(guards, counters, POD, COOKIE + guards.facts.max_entries, FIRST_LINK) == row
    assert list(read_counts(guards, counters)) == []


def test_no_two_links_get_one_row(maps: tuple[Map, Map]) -> None:
    give = partial(give_row, *maps, POD, COOKIE)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(give, range(FIRST_LINK, FIRST_LINK + 200)))
    assert sorted(rows) == list(range(COOKIE, COOKIE + 200))

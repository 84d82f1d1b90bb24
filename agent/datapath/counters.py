"""The rows of ss_counters: which link has which, and what guard counted there.

A row belongs to a link from the moment when ss_guards names it until that entry goes. Its numbers
are cleared when it is given, so nothing has to be done when it is given back.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from agent.datapath.records import guarded_record
from agent.errors import MapError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from agent.datapath.btf import Value
    from agent.datapath.maps import Map
    from agent.model.pod import LocalPod

OUTCOME_COUNT = 4  # of enum outcome
_OF_A_LINK = 2 * OUTCOME_COUNT  # outbound and inbound
_GIVING = threading.Lock()  # links are guarded in threads, and no two may find the same row free


class Count(NamedTuple):
    """How many packets and bytes of a link, in one direction, had one outcome."""

    netns_cookie: int
    ifindex: int  # of the node
    direction: int
    outcome: int
    packets: int
    bytes: int


def give_row(guards: Map, counters: Map, pod: LocalPod, netns_cookie: int, ifindex: int) -> int:
    """Write the entry of ss_guards for a link, with a row of its own, and return that (MapError).

    A link that the pod had before keeps its row, and what is counted there.
    """
    key: dict[str, Value] = {"value": ifindex}
    with _GIVING:
        before = guards.get(key)
        if before is not None and before["netns_cookie"] == netns_cookie:
            row = _number(before["row"])
        else:
            taken = {value["row"] for other, value in guards.items() if other != key}
            row = _free_row(taken, netns_cookie, guards.facts.max_entries)
            for index in _indices(row):
                counters.put({"value": index}, {})
        guards.put(key, guarded_record(pod, netns_cookie, row))
    return row


def read_counts(guards: Map, counters: Map) -> Iterator[Count]:
    """Yield what guard has counted of every link, without what never happened."""
    for key, guarded in guards.items():
        cookie, ifindex = _number(guarded["netns_cookie"]), _number(key["value"])
        for index in _indices(_number(guarded["row"])):
            found = counters.get({"value": index}) or {}
            packets, size = _number(found.get("packets", 0)), _number(found.get("bytes", 0))
            if packets:
                direction, outcome = divmod(index % _OF_A_LINK, OUTCOME_COUNT)
                yield Count(cookie, ifindex, direction, outcome, packets, size)


def _free_row(taken: Collection[Value], netns_cookie: int, count: int) -> int:
    # From a place of the pod's own on, so that one that comes back finds what its connections that
    # are still open count in, and nobody else's do.
    for number in range(count):
        row = (netns_cookie + number) % count
        if row not in taken:
            return row
    raise MapError(f"ss_guards is full: {count} links are guarded")


def _indices(row: int) -> range:
    return range(row * _OF_A_LINK, (row + 1) * _OF_A_LINK)


def _number(value: Value) -> int:
    assert isinstance(value, int)
    return value

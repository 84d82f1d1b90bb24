"""A BPF map without room."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from agent.errors import MapError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath.maps import Map, Record


@contextmanager
def full(opened: Map) -> Iterator[None]:
    """Fill a map whose keys have a netns cookie with entries of nobody."""
    made: list[Record] = []
    try:
        for number in range(opened.facts.max_entries + 1):
            key: Record = {"netns_cookie": 2**63 + number}
            try:
                opened.put(key, {})
            except MapError:
                break  # earlier than at the last, if connections of others are in it
            made.append(key)
        else:
            pytest.fail("the map takes more than it has room for")
        yield
    finally:
        for key in made:
            opened.delete(key)

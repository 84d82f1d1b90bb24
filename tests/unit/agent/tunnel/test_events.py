"""Events: a session that matches on them misses none."""

from __future__ import annotations

import dataclasses
import typing

from agent.tunnel import events


def test_union_names_every_event() -> None:
    declared = {value for value in vars(events).values() if dataclasses.is_dataclass(value)}
    assert set(typing.get_args(events.Event)) == declared


def test_every_event_of_a_stream_says_which() -> None:
    of_streams = {
        events.ConnectRequested,
        events.ResponseReceived,
        events.DataReceived,
        events.StreamEnded,
        events.StreamReset,
        events.WindowOpened,
    }
    for kind in typing.get_args(events.Event):
        names = {field.name for field in dataclasses.fields(kind)}
        assert ("stream_id" in names) == (kind in of_streams), kind

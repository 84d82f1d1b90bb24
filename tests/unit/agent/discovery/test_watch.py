"""The stream of a watch: lines cut anywhere, each kind of event, and what is none."""

from __future__ import annotations

import json

import pytest

from agent.discovery.watch import GONE, Changed, Deleted, Failed, Progressed, Stream, parse_event

BODY = {"metadata": {"name": "a", "resourceVersion": "7"}}


def line(kind: str, body: object = BODY) -> bytes:
    return json.dumps({"type": kind, "object": body}).encode() + b"\n"


@pytest.mark.parametrize(
    ("sent", "event"),
    [
        (line("ADDED"), Changed("7", BODY)),
        (line("MODIFIED"), Changed("7", BODY)),
        (line("DELETED"), Deleted("7", BODY)),
        (line("BOOKMARK"), Progressed("7")),
        (line("ERROR", {"code": 410, "message": "too old"}), Failed(GONE, "too old")),
        (line("ERROR", {}), Failed(0, "")),
    ],
)
def test_each_line_is_an_event(sent: bytes, event: object) -> None:
    assert parse_event(sent) == event


def test_lines_may_be_cut_anywhere() -> None:
    sent = line("ADDED") + b"\n" + line("DELETED") + line("BOOKMARK")
    whole = Stream().feed(sent)
    assert [type(event) for event in whole] == [Changed, Deleted, Progressed]
    for size in range(1, 40):
        stream = Stream()
        chunks = [sent[start : start + size] for start in range(0, len(sent), size)]
        assert [event for chunk in chunks for event in stream.feed(chunk)] == whole


def test_half_a_line_waits_for_its_end() -> None:
    stream = Stream()
    assert stream.feed(line("ADDED")[:-1]) == []
    assert stream.feed(b"\n") == [Changed("7", BODY)]


@pytest.mark.parametrize(
    "sent",
    [b"{", b"[]", b"null", b"{}", b'{"type": "ADDED"}', b'{"type": "ADDED", "object": null}',
     b'{"type": "ADDED", "object": {"metadata": {}}}', b'{"type": "ERROR", "object": []}',
     b'{"type": "ERROR", "object": {"code": "x"}}', line("SURPRISE")],
)  # fmt: skip
def test_what_is_no_event_is_refused(sent: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of which kind, JSON decides
        parse_event(sent)

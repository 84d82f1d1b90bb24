"""Profiles, decoded again by protobuf's own rules."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

from agent.pprof import build_profile

if TYPE_CHECKING:
    from agent.model.stacks import Stacks

READ = ("read", "/a.py", 300)
MAIN = ("main", "/a.py", 1)
Field = tuple[int, int | bytes]


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at


def fields(data: bytes) -> list[Field]:
    found: list[Field] = []
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        value, at = varint(data, at)
        if tag & 7 == 0:
            found.append((tag >> 3, value))
        else:
            assert tag & 7 == 2
            found.append((tag >> 3, data[at : at + value]))
            at += value
    return found


def of(message: bytes, number: int) -> list[int | bytes]:
    return [value for field, value in fields(message) if field == number]


def packed(data: int | bytes) -> list[int]:
    assert isinstance(data, bytes)
    numbers, at = [], 0
    while at < len(data):
        value, at = varint(data, at)
        numbers.append(value)
    return numbers


def messages(message: bytes, number: int) -> list[bytes]:
    found = of(message, number)
    assert all(isinstance(value, bytes) for value in found)
    return found  # type: ignore[return-value]  # as asserted


def test_stacks_come_back_with_counts_time_and_process() -> None:
    stacks: Stacks = (((READ, MAIN), 3), ((MAIN,), 2))
    profile = gzip.decompress(build_profile({"control": stacks, "worker 7": ()}, 1.5, 100))
    texts = [text.decode() for text in messages(profile, 6)]
    assert texts[0] == ""

    def text(message: bytes, number: int) -> str:
        (index,) = of(message, number)
        assert isinstance(index, int)
        return texts[index]

    assert [(text(kind, 1), text(kind, 2)) for kind in messages(profile, 1)] == [
        ("samples", "count"),
        ("cpu", "nanoseconds"),
    ]
    functions = {of(found, 1)[0]: found for found in messages(profile, 5)}
    frames = {}
    for location in messages(profile, 4):
        (line,) = messages(location, 4)
        function = functions[of(line, 1)[0]]
        frames[of(location, 1)[0]] = (text(function, 2), text(function, 4), of(line, 2)[0])
    samples = []
    for sample in messages(profile, 2):
        places = tuple(frames[number] for number in packed(of(sample, 1)[0]))
        (label,) = messages(sample, 3)
        samples.append((places, packed(of(sample, 2)[0]), text(label, 1), text(label, 2)))
    period = 10_000_000
    assert samples == [
        ((READ, MAIN), [3, 3 * period], "process", "control"),
        ((MAIN,), [2, 2 * period], "process", "control"),
    ]
    assert of(profile, 10) == [1_500_000_000]
    assert of(profile, 12) == [period]

"""Sampled stacks as a profile that `go tool pprof` and its kin read. Pure.

    Profile   sample_type = 1, sample = 2, location = 4, function = 5, string_table = 6 (repeated),
              duration_nanos = 10, period_type = 11, period = 12
    ValueType type = 1, unit = 2                  (indices into the string table)
    Sample    location_id = 1 packed, value = 2 packed, label = 3
    Label     key = 1, str = 2
    Location  id = 1, line = 4 { function_id = 1, line = 2 }
    Function  id = 1, name = 2, system_name = 3, filename = 4

Source: proto/profile.proto of github.com/google/pprof. Encoded by hand: eight messages of numbers
do not need protobuf's runtime in the agent (docs/decisions/0006-grpc-without-protobuf.md).
"""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.model.stacks import Frame, Stacks

VARINT, LENGTH = 0, 2
PROCESS = "process"


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | LENGTH) + _varint(len(content)) + content


def _packed(field: int, values: list[int]) -> bytes:
    return _bytes(field, b"".join(map(_varint, values)))


def build_profile(processes: Mapping[str, Stacks], seconds: float, frequency: int) -> bytes:
    """Return a gzip-compressed profile of stacks by the name of their process.

    `frequency` is how many samples a second of processor time gives.
    """
    texts: dict[str, int] = {"": 0}
    functions: dict[tuple[str, str], int] = {}
    locations: dict[Frame, int] = {}

    def text(value: str) -> int:
        return texts.setdefault(value, len(texts))

    def function(name: str, file: str) -> int:
        return functions.setdefault((name, file), len(functions) + 1)

    def location(frame: Frame) -> int:
        return locations.setdefault(frame, len(locations) + 1)

    period = 1_000_000_000 // frequency
    made = _bytes(1, _number(1, text("samples")) + _number(2, text("count")))
    made += _bytes(1, _number(1, text("cpu")) + _number(2, text("nanoseconds")))
    for process, stacks in processes.items():
        label = _bytes(3, _number(1, text(PROCESS)) + _number(2, text(process)))
        for stack, count in stacks:
            places = _packed(1, [location(frame) for frame in stack])
            made += _bytes(2, places + _packed(2, [count, count * period]) + label)
    for (name, file, line), number in locations.items():
        place = _number(1, function(name, file)) + _number(2, line)
        made += _bytes(4, _number(1, number) + _bytes(4, place))
    for (name, file), number in functions.items():
        names = _number(2, text(name)) + _number(3, text(name)) + _number(4, text(file))
        made += _bytes(5, _number(1, number) + names)
    made += _number(10, int(seconds * 1_000_000_000))
    made += _bytes(11, _number(1, text("cpu")) + _number(2, text("nanoseconds")))
    made += _number(12, period)
    made += b"".join(_bytes(6, each.encode()) for each in texts)
    return gzip.compress(made, mtime=0)

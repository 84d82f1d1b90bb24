"""Sampled stacks as a profile that `go tool pprof` and its kin read. Pure.

    Profile   sample_type = 1, sample = 2, location = 4, function = 5, string_table = 6 (repeated),
              duration_nanos = 10, period_type = 11, period = 12
    ValueType type = 1, unit = 2                  (indices into the string table)
    Sample    location_id = 1 packed, value = 2 packed, label = 3
    Label     key = 1, str = 2
    Location  id = 1, line = 4 { function_id = 1, line = 2 }
    Function  id = 1, name = 2, system_name = 3, filename = 4

Source: proto/profile.proto of github.com/google/pprof. `agent.protobuf` encodes it.
"""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

from agent.protobuf import build_bytes, build_number, build_varint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.model.stacks import Frame, Stacks

PROCESS = "process"


def _packed(field: int, values: list[int]) -> bytes:
    return build_bytes(field, b"".join(map(build_varint, values)))


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
    made = build_bytes(1, build_number(1, text("samples")) + build_number(2, text("count")))
    made += build_bytes(1, build_number(1, text("cpu")) + build_number(2, text("nanoseconds")))
    for process, stacks in processes.items():
        label = build_bytes(3, build_number(1, text(PROCESS)) + build_number(2, text(process)))
        for stack, count in stacks:
            places = _packed(1, [location(frame) for frame in stack])
            made += build_bytes(2, places + _packed(2, [count, count * period]) + label)
    for (name, file, line), number in locations.items():
        place = build_number(1, function(name, file)) + build_number(2, line)
        made += build_bytes(4, build_number(1, number) + build_bytes(4, place))
    for (name, file), number in functions.items():
        names = (
            build_number(2, text(name)) + build_number(3, text(name)) + build_number(4, text(file))
        )
        made += build_bytes(5, build_number(1, number) + names)
    made += build_number(10, int(seconds * 1_000_000_000))
    made += build_bytes(11, build_number(1, text("cpu")) + build_number(2, text("nanoseconds")))
    made += build_number(12, period)
    made += b"".join(build_bytes(6, each.encode()) for each in texts)
    return gzip.compress(made, mtime=0)

"""One pinned map, read and written by member names.

The layout comes from the map's own BTF, so that nothing here knows an offset. Used by `pins`, which
opens maps, and by those who hold one; a Map owns its descriptor until `close`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agent.datapath import libbpf
from agent.datapath.btf import Layout, TypeTable, Value, integer_layout
from agent.errors import AbiMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Record = dict[str, Value]


class Map:
    """An open map; `key` and `value` are the layouts of its entries."""

    def __init__(self, path: Path) -> None:
        """Open the map pinned at `path` (MapError; AbiMismatch if it is not one of ours)."""
        self.fd = libbpf.open_pin(path)
        try:
            self.facts = libbpf.map_facts(self.fd)
            self.key, self.value = self._read_layouts(path)
            if (self.key.size, self.value.size) != (self.facts.key_size, self.facts.value_size):
                raise AbiMismatch(f"{path} has sizes that its type information does not explain")
        except BaseException:
            os.close(self.fd)
            raise

    def _read_layouts(self, path: Path) -> tuple[Layout, Layout]:
        if self.facts.type in (libbpf.MAP_TYPE_SOCKHASH, libbpf.MAP_TYPE_RINGBUF):
            # The kernel keeps no types for these; both sides are plain integers, or nothing.
            return integer_layout(self.facts.key_size), integer_layout(self.facts.value_size)
        if not self.facts.btf_id:
            raise AbiMismatch(f"{path} carries no type information, so it is not Sidestep's")
        types = TypeTable(libbpf.read_btf(self.facts.btf_id))
        return types.layout(self.facts.key_type_id), types.layout(self.facts.value_type_id)

    @property
    def _value_bytes(self) -> int:
        """How much the kernel writes for one key: per-CPU values are rounded up to 8 bytes."""
        size = self.facts.value_size
        if self.facts.type in libbpf.PER_CPU_MAP_TYPES:
            return -(-size // 8) * 8 * libbpf.possible_cpus()
        return size

    def _decode_value(self, data: bytes) -> Record:
        if self.facts.type not in libbpf.PER_CPU_MAP_TYPES:
            return self.value.decode(data)
        stride = len(data) // libbpf.possible_cpus()
        each = [self.value.decode(data[at : at + stride]) for at in range(0, len(data), stride)]
        return {name: sum(_number(values[name]) for values in each) for name in each[0]}

    def get(self, key: Record) -> Record | None:
        """Return the value of `key` by member names, or None; of a per-CPU map the sums."""
        value = libbpf.lookup(self.fd, self.key.encode(**key), self._value_bytes)
        return None if value is None else self._decode_value(value)

    def put(self, key: Record, value: Record) -> None:
        """Write `value` under `key` (MapError, for one if the map is full).

        In a per-CPU map every processor gets it.
        """
        data = self.value.encode(**value)
        if self.facts.type in libbpf.PER_CPU_MAP_TYPES:
            count = libbpf.possible_cpus()
            data = data.ljust(self._value_bytes // count, b"\0") * count
        libbpf.update(self.fd, self.key.encode(**key), data)

    def delete(self, key: Record) -> bool:
        """Delete `key`; False if it was not there."""
        return libbpf.delete(self.fd, self.key.encode(**key))

    def items(self) -> Iterator[tuple[Record, Record]]:
        """Yield the entries; one that goes away meanwhile is left out."""
        for key in libbpf.keys(self.fd, self.facts.key_size, self.facts.max_entries):
            value = libbpf.lookup(self.fd, key, self._value_bytes)
            if value is not None:
                yield self.key.decode(key), self._decode_value(value)

    def close(self) -> None:
        """Give the descriptor back; the pinned map stays."""
        os.close(self.fd)


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise AbiMismatch("a per-CPU map holds bytes where a number should be")
    return value

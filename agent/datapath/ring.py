"""The reading end of a BPF ring buffer, by its mapped pages: many records at the price of one call.

    page 0          position of the reader, in bytes, ever growing       written by us
    page 1          position of the writer                               written by the kernel
    pages 2..       the records, mapped twice in a row, so that none is ever torn at the end

A record is a head of eight bytes (u32 size with two flags, u32 for the kernel) and the sample,
padded to eight bytes (kernel: Documentation/bpf/ringbuf.rst). libbpf would call back into Python
for each of them, which costs far more than to count it.

All samples of one ring have one size here. Does not know what they mean; `direct` does.
"""

from __future__ import annotations

import mmap
import select
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.datapath import libbpf
from agent.errors import MapError

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD_BYTES = 8
BUSY, DISCARDED = 1 << 31, 1 << 30  # BPF_RINGBUF_BUSY_BIT and _DISCARD_BIT, linux/bpf.h


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one size, one behind the other; their heads are skipped by the reader."""

    records: bytes
    stride: int  # bytes from one record to the next

    def __len__(self) -> int:
        return len(self.records) // self.stride

    def samples(self, limit: int) -> Iterator[bytes]:
        """Yield the first `limit` samples, with the padding behind them."""
        for at in range(0, min(len(self), limit) * self.stride, self.stride):
            yield self.records[at + HEAD_BYTES : at + self.stride]


class RingBuffer:
    """A reader of a ring buffer; the map's descriptor is readable while there is something to read.

    One reader at a time: its position is kept in the map.
    """

    def __init__(self, map_fd: int, sample_bytes: int) -> None:
        """Map a ring that stays the caller's (MapError); every sample has `sample_bytes`."""
        self.stride = HEAD_BYTES + (sample_bytes + 7) // 8 * 8
        self._sample_bytes = sample_bytes
        self._heads = struct.Struct(f"=I{self.stride - 4}x")
        self._size = libbpf.map_facts(map_fd).max_entries
        page = mmap.PAGESIZE
        try:
            self._own = mmap.mmap(map_fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._kernels = mmap.mmap(
                map_fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except OSError as error:
            raise MapError(f"a ring buffer cannot be mapped: {error}") from error
        # As words: one load or store each, where a struct may be read byte by byte.
        self._read_to = memoryview(self._own).cast("Q")
        self._written_to = memoryview(self._kernels)[:page].cast("Q")
        self._area = memoryview(self._kernels)[page:]
        self._poll = select.poll()
        self._poll.register(map_fd, select.POLLIN)

    def read(self) -> Batch:
        """Return the samples since the last call, without waiting.

        MapError if one is of another size: a writer of another build.
        """
        begin, end = self._read_to[0], self._written_to[0]
        # A system call between the position and what it covers, and between the flags and the
        # samples: a processor that orders loads loosely may not take the second before the first.
        self._poll.poll(0)
        offset = begin % self._size
        area = self._area[offset : offset + end - begin]
        ready, is_whole = self._count_ready(area)
        self._poll.poll(0)
        records = bytes(area[: ready * self.stride])
        self._read_to[0] = begin + len(records)
        return Batch(records if is_whole else self._without_discarded(records), self.stride)

    def _count_ready(self, area: memoryview) -> tuple[int, bool]:
        """Return how many records are committed in a row, and whether none was discarded."""
        usual, is_whole = self._sample_bytes, True
        whole = area[: len(area) // self.stride * self.stride]
        for count, (head,) in enumerate(self._heads.iter_unpack(whole)):
            if head != usual:
                if head & BUSY:
                    return count, is_whole
                if head & ~DISCARDED != usual:
                    raise MapError(f"a ring buffer holds a sample of {head & ~DISCARDED} bytes")
                is_whole = False
        return len(whole) // self.stride, is_whole

    def _without_discarded(self, records: bytes) -> bytes:
        stride = self.stride
        heads = enumerate(self._heads.iter_unpack(records))
        return b"".join(
            records[at * stride : (at + 1) * stride]
            for at, (head,) in heads
            if not head & DISCARDED
        )

    def close(self) -> None:
        """Give the mappings back."""
        for view in (self._read_to, self._written_to, self._area):
            view.release()
        self._own.close()
        self._kernels.close()

"""Limits as values."""

from __future__ import annotations

import pytest

from agent.model.bounds import DEFAULT_BOUNDS, LEAST_BUFFER_BYTES, Bounds, buffers_within


def test_peers_may_open_more_streams_than_we_do() -> None:
    assert Bounds(streams_per_tunnel=7).accepted_streams == 14
    assert DEFAULT_BOUNDS.accepted_streams > DEFAULT_BOUNDS.streams_per_tunnel


@pytest.mark.parametrize(
    ("memory_bytes", "worker_count", "expected"),
    [
        (1 << 40, 1, DEFAULT_BOUNDS.process_buffer_bytes),
        (1 << 30, 2, DEFAULT_BOUNDS.process_buffer_bytes),
        (1 << 30, 8, 64 << 20),
        (32 << 20, 8, LEAST_BUFFER_BYTES),
    ],
)
def test_buffers_of_all_workers_take_half_of_the_memory(
    memory_bytes: int, worker_count: int, expected: int
) -> None:
    assert buffers_within(memory_bytes, worker_count) == expected

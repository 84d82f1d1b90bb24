"""Limits as values."""

from __future__ import annotations

from agent.model.bounds import DEFAULT_BOUNDS, Bounds


def test_peers_may_open_more_streams_than_we_do() -> None:
    assert Bounds(streams_per_tunnel=7).accepted_streams == 14
    assert DEFAULT_BOUNDS.accepted_streams > DEFAULT_BOUNDS.streams_per_tunnel

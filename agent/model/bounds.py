"""How much of a worker one pod or one peer may take: an operator's settings, with defaults.

Values only. `tunnel` refuses what is beyond them; the workers get them with their first message.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a worker; each worker counts for itself.

    A stream's buffer is what a peer may send before the application has taken it, so it is also
    what a stalled reader costs. Descriptors are kept spare for listeners, control messages and logs
    when connections have used up all others.
    """

    handshake_seconds: float = 5.0
    idle_seconds: float = 300.0  # a tunnel without streams
    streams_per_tunnel: int = 100
    tunnels_per_peer: int = 256  # from one pod to one workload: 25,600 connections
    header_bytes: int = 16 << 10
    stream_buffer_bytes: int = 2 << 20
    process_buffer_bytes: int = 256 << 20  # of all pods; of one a quarter: 32 stalled readers
    connections_per_pod: int = 32_768
    spare_descriptors: int = 64

    @property
    def accepted_streams(self) -> int:
        """How many streams a peer may open in one tunnel: a peer of ours never asks for so many."""
        return 2 * self.streams_per_tunnel


DEFAULT_BOUNDS = Bounds()
LEAST_BUFFER_BYTES = 8 << 20  # of a worker: a pod's quarter is one stalled reader


def buffers_within(memory_bytes: int, worker_count: int) -> int:
    """Return what each worker may keep where the agent's processes have so much memory together.

    Half of it is for slow readers, and never more than by default. The other half is for what the
    processes are at rest, the kernel's side of their sockets, and windows on their way.
    """
    share = memory_bytes // 2 // worker_count
    return max(LEAST_BUFFER_BYTES, min(share, DEFAULT_BOUNDS.process_buffer_bytes))

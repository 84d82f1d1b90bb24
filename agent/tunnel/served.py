"""A pod that a worker serves, and when its connections are too many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.tunnel.buffers import FULL, Share

if TYPE_CHECKING:
    from agent.model.bounds import Bounds
    from agent.model.identity import SpiffeId
    from agent.model.pod import LocalPod
    from agent.tunnel.listening import Listening

TOO_MANY = "the pod has all connections that it may have (--connections-per-pod)"


@dataclass
class ServedPod:
    """Descriptors are the worker's own copies, closed by `close`."""

    pod: LocalPod
    identity: SpiffeId
    netns_fd: int
    netns_cookie: int
    listeners: list[tuple[int, Listening]] = field(default_factory=list)  # with their ports
    is_leaving: bool = False
    connections: int = 0  # open ones of the pod, both directions, in this worker
    tunnels: int = 0  # accepted for the pod, in this worker
    handshakes: int = 0  # of those tunnels, whose peers have not proved who they are
    share: Share = field(init=False)  # of the worker's buffers

    def __post_init__(self) -> None:
        self.share = Share(f"{self.pod.namespace}/{self.pod.name}")


def refusal(served: ServedPod, bounds: Bounds) -> str:
    """Say why a pod's newest connection is one too many; empty if it is not."""
    if served.connections > bounds.connections_per_pod:
        return TOO_MANY
    return FULL if served.share.is_full else ""

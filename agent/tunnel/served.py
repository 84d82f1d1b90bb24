"""A pod that a worker serves, and what its connections report when they end."""

from __future__ import annotations

import json
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from agent.tunnel.counts import COUNTS

if TYPE_CHECKING:
    import socket

    from agent.model.identity import SpiffeId
    from agent.model.pod import LocalPod
    from agent.model.verdict import Verdict


_encode = json.JSONEncoder(default=str).encode  # json.dumps would make one for each line


@dataclass
class ServedPod:
    """Descriptors are the worker's own copies, closed by `close`."""

    pod: LocalPod
    identity: SpiffeId
    netns_fd: int
    netns_cookie: int
    listeners: list[tuple[int, socket.socket]]  # with their ports
    is_leaving: bool = False


def log(message: str, **fields: object) -> None:
    """Write one line of JSON to stderr: the worker's log.

    A line that cannot be written (a full disk, a reader that has gone) is lost: connections matter
    more.
    """
    if sys.stderr is None:  # it was closed when the process began
        return
    entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "message": message}
    with suppress(OSError):
        sys.stderr.write(_encode(entry | fields) + "\n")


@dataclass(eq=False)
class Access:
    """The access log entry of one connection, written when it ends."""

    direction: str
    pod: LocalPod
    source: str
    destination: str
    path: str = "tcp"
    peer_identity: str | None = None
    verdict: Verdict | None = None  # of an inbound connection
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Count as open until `complete`, or until nobody holds it."""
        OPEN.add(self)

    def complete(self, result: str, sent: int = 0, received: int = 0) -> None:
        """Write it, and count it; `sent` counts bytes away from the client."""
        OPEN.discard(self)
        verdict = self.verdict
        is_denied = verdict is not None and not verdict.is_allowed
        outcome = "denied" if is_denied else result if result in ("ok", "reset") else "failed"
        COUNTS.add("connections", direction=self.direction, path=self.path, outcome=outcome)
        COUNTS.add("sent_bytes", sent, direction=self.direction, path=self.path)
        COUNTS.add("received_bytes", received, direction=self.direction, path=self.path)
        if verdict is not None and is_denied:
            COUNTS.add("connections_denied", policy=verdict.decided_by or "")
        would_be = verdict.would_be if verdict else None
        log(
            "connection complete",
            direction=self.direction,
            pod=f"{self.pod.namespace}/{self.pod.name}",
            source=self.source,
            destination=self.destination,
            path=self.path,
            peer_identity=self.peer_identity,
            bytes_sent=sent,
            bytes_received=received,
            duration_ms=round((time.monotonic() - self.began) * 1000, 1),
            result=result,
            verdict=None if verdict is None else "allow" if verdict.is_allowed else "deny",
            policy=verdict.decided_by if verdict else None,
            dry_run=str(would_be) if would_be else None,
        )


OPEN: weakref.WeakSet[Access] = weakref.WeakSet()  # connections of this worker that have not ended


def endpoint(host: str, port: int) -> str:
    """Format an address and port as in `:authority` (RFC 3986 §3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

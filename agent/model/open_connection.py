"""A connection that is open now, as whoever carries it tells. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class OpenConnection:
    """One connection from the view of a pod of this node.

    Addresses are texts, `ADDRESS:PORT`. `original` is what the client asked for, `destination`
    where the connection went. Identities are those that were proved. `sent` counts the client's
    bytes, `received` the server's; None where the kernel does not tell.
    """

    namespace: str
    pod: str
    direction: str  # outbound or inbound: the pod's view
    path: str  # hbone, direct, plaintext or tcp
    state: str  # opening or open
    source: str
    original: str
    destination: str
    service: str | None
    source_pod: str | None  # namespace/name
    destination_pod: str | None
    source_identity: str | None
    destination_identity: str | None
    policy: str | None
    sent: int | None
    received: int | None
    age_seconds: float

    def row(self) -> dict[str, object]:
        """Return it as listings show it."""
        return {
            "pod": f"{self.namespace}/{self.pod}",
            "direction": self.direction,
            "path": self.path,
            "state": self.state,
            "source": self.source,
            "source_pod": self.source_pod,
            "source_identity": self.source_identity,
            "destination": self.destination,
            "destination_pod": self.destination_pod,
            "destination_identity": self.destination_identity,
            "original_destination": self.original,
            "service": self.service,
            "policy": self.policy,
            "bytes_sent": self.sent,
            "bytes_received": self.received,
            "age_seconds": self.age_seconds,
        }

    @staticmethod
    def parse(row: Mapping[str, Any]) -> OpenConnection:
        """Read what `row` has made; there may be more in it (LookupError: something is missing)."""
        namespace, _separator, pod = str(row["pod"]).partition("/")
        return OpenConnection(
            namespace=namespace,
            pod=pod,
            direction=row["direction"],
            path=row["path"],
            state=row["state"],
            source=row["source"],
            original=row["original_destination"],
            destination=row["destination"],
            service=row["service"],
            source_pod=row["source_pod"],
            destination_pod=row["destination_pod"],
            source_identity=row["source_identity"],
            destination_identity=row["destination_identity"],
            policy=row["policy"],
            sent=row["bytes_sent"],
            received=row["bytes_received"],
            age_seconds=row["age_seconds"],
        )

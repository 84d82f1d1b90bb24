"""The connections that a worker carries: listed while they are open, counted, and logged.

    open -> (established) -> complete        each once, whatever happens in between

A connection is counted as opened when it is established or has failed, since only then it is known
who the peer is; so what was opened and what was closed carry the same labels. Bytes are counted as
they go, so that one long transfer shows before it ends.

The log's fields are those of ambient mesh (docs/operations.md). `bytes_sent` there is the view of
the pod that the line is about; counted are, for both ends alike, the client's bytes as received and
the server's as sent: Istio's names, which dashboards rely on.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING

from agent.line_log import LOG, log
from agent.loglines import ACCESS
from agent.model.capture import HBONE_PORT
from agent.model.endpoint import endpoint
from agent.model.flag import Flag, flag_of
from agent.model.open_connection import OpenConnection
from agent.tunnel.counts import COUNTS
from agent.tunnel.labels import Party, build_labels, read_service_name
from agent.tunnel.limiter import Limiter

if TYPE_CHECKING:
    from typing import Protocol

    from agent.model.pod import Address
    from agent.model.verdict import Verdict
    from agent.model.workload import Workload
    from agent.tunnel.counts import Labels
    from agent.tunnel.labels import ServiceName
    from agent.tunnel.mesh import Mesh
    from agent.tunnel.reactor import Reactor
    from agent.tunnel.served import ServedPod

    class Carried(Protocol):
        """What counts the bytes of an open connection: a Relay."""

        sent: int
        received: int


FLUSH_SECONDS = 10.0  # between two looks at the bytes of open connections
REPORT_SECONDS = 1.0  # until a flood is summed up in one line
LINES_A_SECOND = 1000
End = tuple["Address", int]


@lru_cache(maxsize=64)
def _own_labels(**labels: str) -> Labels:
    return tuple(sorted(labels.items()))


class Access:
    """One connection; made by a Ledger."""

    __slots__ = (
        "_counted_received",
        "_counted_sent",
        "_labels",
        "_ledger",
        "_number",
        "began",
        "carried",
        "destination",
        "destination_party",
        "direction",
        "hbone_target",
        "original",
        "path",
        "served",
        "service",
        "source",
        "source_party",
        "verdict",
    )

    def __init__(
        self,
        ledger: Ledger,
        number: int,
        direction: str,
        served: ServedPod,
        ends: tuple[str, str],
        parties: tuple[Party, Party],
        path: str,
    ) -> None:
        self.direction = direction
        self.served = served
        self.source, self.original = ends
        self.destination = self.original
        self.hbone_target: str | None = None
        self.source_party, self.destination_party = parties
        self.path = path
        self.service: ServiceName | None = None
        self.verdict: Verdict | None = None  # of an inbound connection
        self.carried: Carried | None = None
        self.began = time.monotonic()
        self._ledger = ledger
        self._number = number
        self._counted_sent = self._counted_received = 0
        self._labels: Labels | None = None  # of what did not fail, once both ends are known
        served.connections += 1

    @property
    def reporter(self) -> str:
        return "source" if self.direction == "outbound" else "destination"

    def tunnel_to(self, workload: Workload, address: Address, authority: str) -> None:
        """Say that a tunnel takes it to a workload, where `authority` is asked for."""
        self.path = "hbone"
        self.destination = endpoint(str(address), HBONE_PORT)
        self.hbone_target = authority
        self.destination_party = Party(workload)

    def prove(self, own: str, peer: str) -> None:
        """Say which identities both ends of the tunnel have proved."""
        if self.direction == "outbound":
            source, destination = own, peer
        else:
            source, destination = peer, own
        self.source_party = Party(self.source_party.workload, source)
        self.destination_party = Party(self.destination_party.workload, destination)

    def establish(self, carried: Carried) -> None:
        """Say that bytes flow from now on."""
        self.carried = carried
        self._count_opened()
        if self._ledger.may_log("debug"):
            log("connection opened", level="debug", scope=ACCESS, **self._fields())

    def complete(
        self, result: str, sent: int = 0, received: int = 0, flag: Flag = Flag.CONNECT
    ) -> None:
        """Log and count it; `sent` are the client's bytes.

        `result` is ok, reset (by whoever), or why it failed, and `flag` how if that does not say.
        """
        self.served.connections -= 1
        self._ledger.forget(self._number)
        self.carried = None  # which refers to us
        verdict = self.verdict
        is_denied = verdict is not None and not verdict.is_allowed
        is_failed = is_denied or result not in ("ok", "reset")
        found = Flag.DENIED if is_denied else flag_of(result, flag) if is_failed else Flag.NONE
        outcome = "denied" if is_denied else "failed" if is_failed else result
        good = self._count_opened()
        self._count_bytes(sent, received)
        labels = _own_labels(direction=self.direction, path=self.path, outcome=outcome)
        COUNTS.put("connections", labels)
        labels = self._build_labels(found) if is_failed else good
        COUNTS.put("istio_tcp_connections_closed", labels)
        if is_failed:
            COUNTS.put("istio_tcp_connections_failed", labels)
        if verdict is not None and is_denied:
            COUNTS.add("connections_denied", policy=verdict.decided_by or "")
        level = "error" if is_failed else "info"
        if not self._ledger.may_log(level):
            return
        is_outbound = self.direction == "outbound"
        would_be = verdict.would_be if verdict else None
        fields = self._fields() | {
            "bytes_sent": sent if is_outbound else received,
            "bytes_recv": received if is_outbound else sent,
            "duration": f"{(time.monotonic() - self.began) * 1000:.1f}ms",
            "result": result,  # the reason of the end
            "response_flags": found.value,
            "verdict": None if verdict is None else "allow" if verdict.is_allowed else "deny",
            "policy": verdict.decided_by if verdict else None,
            "dry_run": str(would_be) if would_be else None,
            "error": result if is_failed else None,
        }
        log("connection complete", level=level, scope=ACCESS, **fields)

    def count_now(self) -> None:
        """Count the bytes that went since the last time."""
        if self.carried is not None:
            self._count_bytes(self.carried.sent, self.carried.received)

    def listed(self, now: float) -> OpenConnection:
        """Return it as `sidestep connections` shows it."""
        pod = self.served.pod
        carried, verdict = self.carried, self.verdict
        return OpenConnection(
            namespace=pod.namespace,
            pod=pod.name,
            direction=self.direction,
            path=self.path,
            state="opening" if carried is None else "open",
            source=self.source,
            original=self.original,
            destination=self.hbone_target or self.destination,
            service=self.service.hostname if self.service else None,
            source_pod=_pod_name(self.source_party),
            destination_pod=_pod_name(self.destination_party),
            source_identity=self.source_party.identity,
            destination_identity=self.destination_party.identity,
            policy=verdict.decided_by if verdict else None,
            sent=carried.sent if carried else 0,
            received=carried.received if carried else 0,
            age_seconds=round(now - self.began, 1),
        )

    def _build_labels(self, flag: Flag) -> Labels:
        return build_labels(
            self.reporter, self.source_party, self.destination_party, self.service, flag
        )

    def _count_opened(self) -> Labels:
        """Count it as opened, once; return the labels of a connection that did not fail."""
        if self._labels is None:
            self._labels = self._build_labels(Flag.NONE)
            COUNTS.put("istio_tcp_connections_opened", self._labels)
        return self._labels

    def _count_bytes(self, sent: int, received: int) -> None:
        more_sent, more_received = sent - self._counted_sent, received - self._counted_received
        if not (more_sent or more_received):
            return
        self._counted_sent, self._counted_received = sent, received
        own, labels = _own_labels(direction=self.direction, path=self.path), self._count_opened()
        COUNTS.put("sent_bytes", own, more_sent)
        COUNTS.put("received_bytes", own, more_received)
        COUNTS.put("istio_tcp_received_bytes", labels, more_sent)
        COUNTS.put("istio_tcp_sent_bytes", labels, more_received)

    def _fields(self) -> dict[str, object]:
        source, destination = self.source_party, self.destination_party
        return {
            "src.addr": self.source,
            **_named("src", source),
            "dst.addr": self.destination,
            "dst.hbone_addr": self.hbone_target,
            "dst.original": self.original,
            "dst.service": self.service.hostname if self.service else None,
            **_named("dst", destination),
            "direction": self.direction,
            "path": self.path,
        }


def _named(prefix: str, party: Party) -> dict[str, object]:
    workload = party.workload
    return {
        f"{prefix}.workload": workload.name if workload else None,
        f"{prefix}.namespace": workload.namespace if workload else None,
        f"{prefix}.identity": party.identity,
    }


def _pod_name(party: Party) -> str | None:
    workload = party.workload
    return f"{workload.namespace}/{workload.name}" if workload else None


class Ledger:
    """All open connections of a worker."""

    def __init__(self, reactor: Reactor, mesh: Mesh) -> None:
        self._reactor = reactor
        self._mesh = mesh
        self._open: dict[int, Access] = {}
        self._next = 1
        self._limiter = Limiter(LINES_A_SECOND)
        self._is_flush_due = self._is_report_due = False

    def set_limit(self, lines_a_second: int) -> None:
        """Write so many lines each second, 0 for all; what is beyond is counted."""
        self._limiter = Limiter(lines_a_second)

    def outbound(self, served: ServedPod, source: End, original: End) -> Access:
        """Begin the record of a connection that a pod opened."""
        ends = (endpoint(str(source[0]), source[1]), endpoint(str(original[0]), original[1]))
        parties = (self._own(served), Party(self._mesh.at(original[0])))
        return self._add("outbound", served, ends, parties, "tcp")

    def inbound(
        self, served: ServedPod, source: str, source_address: Address, original: str, path: str
    ) -> Access:
        """Begin the record of a connection to a pod."""
        parties = (Party(self._mesh.at(source_address)), self._own(served))
        return self._add("inbound", served, (source, original), parties, path)

    def known_service(self, hostname: str | None) -> ServiceName | None:
        """Return the service that a peer names, if there is one of that name.

        Anything else would be a series of metrics for whatever a peer says.
        """
        found = read_service_name(hostname)
        if found is None or not self._mesh.has_service(found.namespace, found.name):
            return None
        return found

    def list(
        self, after: int, most: int, namespace: str | None, pod: str | None
    ) -> tuple[list[OpenConnection], int]:
        """List `most` connections that were opened after a number, and the last one's number.

        The number is 0 if there are no more. `namespace` and `pod` leave others out.
        """
        now = time.monotonic()
        found: list[OpenConnection] = []
        for number, access in self._open.items():
            if number <= after:
                continue
            if len(found) == most:
                return found, after
            after = number
            own = access.served.pod
            if namespace in (None, own.namespace) and pod in (None, own.name):
                found.append(access.listed(now))
        return found, 0

    @property
    def has_open(self) -> bool:
        """Whether a connection has not ended."""
        return bool(self._open)

    def count(self) -> dict[tuple[str, str], int]:
        """Count the open connections by reporter and path."""
        counted: dict[tuple[str, str], int] = {}
        for access in self._open.values():
            key = (access.reporter, access.path)
            counted[key] = counted.get(key, 0) + 1
        return counted

    def forget(self, number: int) -> None:
        """A connection has ended."""
        self._open.pop(number, None)

    def refuse(self, served: ServedPod, direction: str, source: str, destination: str,
               error: str) -> None:  # fmt: skip
        """Log a connection that was refused before anything of it was known."""
        pod = served.pod
        fields: dict[str, object] = {
            "src.addr": source,
            "dst.addr": destination,
            "direction": direction,
            "pod": f"{pod.namespace}/{pod.name}",
            "error": error,
        }
        if self.may_log("warning"):
            log("connection failed", level="warning", scope=ACCESS, **fields)

    def may_log(self, level: str, scope: str = ACCESS) -> bool:
        """Say whether a line about a connection or a tunnel is to be written now.

        No if nobody wants it, or if too many came in this second: then it is counted.
        """
        if not LOG.levels.wants(scope, level):
            return False
        if self._limiter.may_pass(time.monotonic()):
            return True
        if not self._is_report_due:
            self._is_report_due = True
            self._reactor.call_later(REPORT_SECONDS, self._report)
        return False

    def _report(self) -> None:
        self._is_report_due = False
        count = self._limiter.take_suppressed()
        text = "connections not logged, too many at once"
        log(text, level="warning", scope=ACCESS, count=count)

    def _own(self, served: ServedPod) -> Party:
        return Party(self._mesh.workload(served.pod.uid))

    def _add(
        self,
        direction: str,
        served: ServedPod,
        ends: tuple[str, str],
        parties: tuple[Party, Party],
        path: str,
    ) -> Access:
        number, self._next = self._next, self._next + 1
        access = Access(self, number, direction, served, ends, parties, path)
        self._open[number] = access
        if not self._is_flush_due:
            self._is_flush_due = True
            self._reactor.call_later(FLUSH_SECONDS, self._flush)
        return access

    def _flush(self) -> None:
        for access in self._open.values():
            access.count_now()
        self._is_flush_due = bool(self._open)
        if self._is_flush_due:
            self._reactor.call_later(FLUSH_SECONDS, self._flush)

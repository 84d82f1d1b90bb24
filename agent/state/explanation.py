"""Why a connection goes where it goes: path, verdict, who decides, and what would change it. Pure.

    source     destination   path           listed as   judged
    enrolled   enrolled      tunnel         hbone       at the destination, with source's identity
    enrolled   enrolled      direct         direct      the same: on one node, from the second on
    other      enrolled      plaintext      plaintext   at the destination, without an identity
    any        other         passthrough    tcp         not at all

`denied` stands for the path if the connection does not come to be. Exclusions and a pod's
connection to itself bypass the mesh. Connections, logs and metrics list what passed an agent, so a
passthrough only if an enrolled pod connects. Called for `sidestep explain`; reads the same rulebook
as enforcement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Literal

from agent.errors import NameUnknown
from agent.model.capture import LISTENER_PORTS
from agent.model.condition import Connection
from agent.model.endpoint import endpoint
from agent.model.enrollment import MODE_LABEL, Refusal
from agent.model.policy import Action, PeerAuthentication, Policy
from agent.model.verdict import Basis, Verdict
from agent.model.workload import owners

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from agent.model.identity import SpiffeId
    from agent.model.pod import Address, Exclusions, LocalPod
    from agent.model.service import Service
    from agent.model.workload import Workload
    from agent.state.rulebook import Rulebook
    from agent.state.store import Snapshot

Path = Literal["tunnel", "direct", "plaintext", "passthrough", "denied"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One connection explained; `verdict` None means that no policy is asked.

    The identities are those that the ends have; `is_proved` says whether each learns the other's.
    """

    source: str
    destination: str
    path: Path
    reason: str
    verdict: Verdict | None = None
    source_identity: SpiffeId | None = None
    destination_identity: SpiffeId | None = None
    is_proved: bool = False
    to_change: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def row(self) -> dict[str, object]:
        """Return it as plain values, for an answer or a listing."""
        verdict, is_denied = self.verdict, self.path == "denied"
        word = "deny" if is_denied else "allow" if verdict else None
        explained = str(verdict) if verdict else f"denied: {self.reason}" if is_denied else None
        return {
            "source": self.source,
            "destination": self.destination,
            "path": self.path,
            "verdict": word,
            "decided_by": verdict.decided_by if verdict else None,
            "explained": explained,
            "reason": self.reason,
            "source_identity": str(self.source_identity) if self.source_identity else None,
            "destination_identity": (
                str(self.destination_identity) if self.destination_identity else None
            ),
            "identities_proved": self.is_proved,
            "dry_run": str(verdict.would_be) if verdict and verdict.would_be else None,
            "to_change": list(self.to_change),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class _End:
    address: Address
    workload: Workload | None
    pod: LocalPod | None  # if it wants the mesh

    def __str__(self) -> str:
        if self.workload is None:
            return str(self.address)
        return f"{self.workload.namespace}/{self.workload.name}"

    @property
    def is_enrolled(self) -> bool:
        return self.workload is not None and self.workload.is_hbone


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the application dials: an endpoint itself, or an address and port of a service."""

    addresses: tuple[Address, ...]
    port: int


def _asked_of(service: Service, port: int, endpoint: tuple[Address, int]) -> _Asked:
    """Return what is dialed to get to an endpoint of a service, in its family where there is one.

    Of a service without addresses, whose name leads to its endpoints, that is the endpoint.
    """
    address, target_port = endpoint
    if not service.addresses:
        return _Asked((address,), target_port)
    same = tuple(each for each in service.addresses if each.version == address.version)
    return _Asked(same or service.addresses, port)


class Explainer:
    """Explains connections in one state of the mesh."""

    def __init__(
        self,
        snapshot: Snapshot,
        rulebook: Rulebook,
        trust_domain: str,
        common: Exclusions,
        has_direct_path: bool,
        unenrolled: Mapping[str, str],
        unguarded: Set[str] = frozenset(),
    ) -> None:
        """Explain for one agent, which knows more of the pods of its node, by uid.

        `unenrolled` says of those that are not enrolled how they fare; `unguarded` are those that
        take no direct path for it.
        """
        self._snapshot = snapshot
        self._rulebook = rulebook
        self._trust_domain = trust_domain
        self._common = common
        self._has_direct_path = has_direct_path
        self._unenrolled = unenrolled
        self._unguarded = unguarded
        self._pods = {pod.uid: pod for pods in snapshot.local_pods.values() for pod in pods}
        self._owners = owners(snapshot.workloads)

    def explain(self, source: str, destination: str, port: int) -> list[Explanation]:
        """Explain a connection; one row for each endpoint if the destination is a service.

        Raises:
            NameUnknown: a name is of no pod and no service, or of several; or none is of a pod.
        """
        origins = self._find_ends(_unmapped(source))
        destination = _unmapped(destination)
        service = self._find_service(destination)
        if service is None:
            ends = self._find_ends(destination)
            if origins[0].workload is None and ends[0].workload is None:
                raise NameUnknown(
                    f"neither {source} nor {destination} is the address of a pod that this agent "
                    "knows: the mesh has no part in what they say to each other"
                )
            asked = _Asked((ends[0].address,), port)
            return [self._explain(_facing(origins, ends[0]), ends[0], port, asked)]
        node = None
        if service.is_local and destination not in map(str, service.balanced):
            node = origins[0].workload.node if origins[0].workload else ""
        targets = service.endpoints_for(port, node)
        if not targets:
            named = f"service {service.namespace}/{service.name}:{port}"
            detail = "the service has no ready endpoint for this port"
            if node is not None:
                detail += f" on node {node} (internalTrafficPolicy: Local)"
            return [Explanation(str(origins[0]), named, "denied", detail)]
        return [
            self._explain(
                _facing(origins, end), end, target_port,
                _asked_of(service, port, (address, target_port)),
            )
            for address, target_port in targets
            for end in (self._end_at(address),)
        ]  # fmt: skip

    # -- names --------------------------------------------------------------------------------

    def _end_at(self, address: Address) -> _End:
        workload = self._owners.get(address)
        return _End(address, workload, self._pods.get(workload.uid) if workload else None)

    def _find_ends(self, name: str) -> list[_End]:
        """Return a pod or an address, once for each address that it has."""
        try:
            return [self._end_at(ip_address(name))]
        except ValueError:
            wanted = name.removeprefix("pod:")
        found = [
            workload
            for workload in self._snapshot.workloads
            if wanted in (workload.name, f"{workload.namespace}/{workload.name}")
        ]
        if len(found) != 1:
            shown = ", ".join(f"{each.namespace}/{each.name}" for each in found)
            raise NameUnknown(
                f"{name} is the name of several pods: {shown}"
                if found
                else f"{name} is no pod, no service and no address that this agent knows; pods on "
                "the host's network, and those that have ended, are of no mesh"
            )
        (workload,) = found
        pod = self._pods.get(workload.uid)
        return [_End(address, workload, pod) for address in workload.addresses]

    def _find_service(self, name: str) -> Service | None:
        """Return a service by name or address; a pod of the same name comes first."""
        wanted = name.removeprefix("service:")
        if name == wanted:
            names = {f"{each.namespace}/{each.name}" for each in self._snapshot.workloads}
            names |= {each.name for each in self._snapshot.workloads}
            if name in names or name.startswith("pod:"):
                return None
        found = [
            service
            for service in self._snapshot.services
            if wanted in _names_of(service)
            or wanted in map(str, (*service.addresses, *service.balanced))
        ]
        if len(found) > 1:
            shown = ", ".join(f"{each.namespace}/{each.name}" for each in found)
            raise NameUnknown(f"{name} is the name of several services: {shown}")
        if not found and name != wanted:
            raise NameUnknown(f"there is no service {wanted}")
        return found[0] if found else None

    # -- paths --------------------------------------------------------------------------------

    def _explain(self, source: _End, destination: _End, port: int, asked: _Asked) -> Explanation:
        target = destination.workload
        unjudged = partial(
            Explanation,
            str(source),
            _named(destination, port),
            source_identity=self._identity(source),
            destination_identity=self._identity(destination),
        )
        if destination.address.is_loopback or destination.address.is_unspecified:
            return unjudged("passthrough", f"{destination} stays inside the pod")
        is_itself = target is not None and target == source.workload
        if is_itself and destination.address in asked.addresses:  # not by a service
            return unjudged("passthrough", "a pod's connection to itself stays inside the pod")
        network = source.workload.network if source.workload else ""
        if target is not None and source.is_enrolled and target.network != network:
            reason = f"{destination} is in another network, and there is no gateway to it"
            return unjudged("denied", reason)
        if target is None or not destination.is_enrolled:
            reason = f"{self._outside(destination)}, so nobody judges who connects"
            return unjudged("passthrough", reason, to_change=self._how_to_enroll(destination))
        if port in LISTENER_PORTS:
            return unjudged("denied", f"port {port} is the agent's own")
        is_captured = source.is_enrolled and not self._is_excluded(source, asked)
        if not is_captured and self._is_open(destination, port):
            reason = f"port {port} of {destination} is excluded from capture: plaintext is not seen"
            return unjudged("passthrough", reason)
        identity = self._identity(source) if is_captured else None
        connection = Connection(source.address, identity, destination.address, port)
        verdict = self._rulebook.judge(target.namespace, target.labels, connection)
        path, reason = self._path(source, destination, is_captured)
        return Explanation(
            str(source),
            _named(destination, port),
            path if verdict.is_allowed else "denied",
            reason if verdict.is_allowed else f"{path} if it were allowed: {reason}",
            verdict,
            self._identity(source),
            self._identity(destination),
            is_captured,
            tuple(self._changes(verdict, connection, source, target)),
            tuple(self._warnings(target)),
        )

    def _path(self, source: _End, destination: _End, is_captured: bool) -> tuple[Path, str]:
        if not is_captured:
            if source.is_enrolled:
                return "plaintext", f"{source} excludes this destination from capture"
            return "plaintext", f"{self._outside(source)}, so it has no identity"
        assert source.workload is not None
        assert destination.workload is not None
        is_near = (
            source.workload.node == destination.workload.node
            and source.workload != destination.workload
        )
        pods = (source.pod, destination.pod)
        if is_near and self._has_direct_path and all(pod and pod.may_go_direct for pod in pods):
            for end in (source, destination):
                if end.workload is not None and end.workload.uid in self._unguarded:
                    return "tunnel", f"{end} has no veth to the node, so it takes no direct path"
            return "direct", "two pods of one node: the first connection is judged in the tunnel"
        return "tunnel", "both pods are in the mesh"

    def _identity(self, end: _End) -> SpiffeId | None:
        if end.workload is None or not end.is_enrolled:
            return None
        return end.workload.identity(self._trust_domain)

    def _is_excluded(self, source: _End, asked: _Asked) -> bool:
        """Whether connect() lets it go: it compares what was asked for (bpf/include/capture.h)."""
        own = (self._common, *([source.pod.exclusions] if source.pod else []))
        return any(
            asked.port in each.outbound_ports
            or any(
                address in network
                for address in asked.addresses
                for network in each.outbound_networks
            )
            for each in own
        )

    def _is_open(self, destination: _End, port: int) -> bool:
        pod = destination.pod
        own = (self._common, *([pod.exclusions] if pod else []))
        return bool(pod and pod.bypasses_inbound) or any(port in each.inbound_ports for each in own)

    # -- advice -------------------------------------------------------------------------------

    def _outside(self, end: _End) -> str:
        """Say that an end is not in the mesh, and why."""
        said = f"{end} is not in the mesh"
        if end.workload is None:
            return said
        uid, node = end.workload.uid, end.workload.node
        if uid in self._snapshot.refusals:
            return f"{said} ({self._snapshot.refusals[uid]})"
        if uid in self._unenrolled:
            return f"{said} ({self._unenrolled[uid]})"
        return f"{said} (the agent of node {node} has not enrolled it)" if node else said

    def _how_to_enroll(self, end: _End) -> tuple[str, ...]:
        """Say what would bring an end into the mesh, if it is a pod for which a label would."""
        if end.workload is None or not end.workload.node:
            return ()
        if end.workload.uid in self._unenrolled:  # what is in the way is said
            return ()
        refusal = self._snapshot.refusals.get(end.workload.uid)
        if refusal is None:
            return (f"see why on node {end.workload.node}: sidestep diff --pod {end}",)
        is_by_label = refusal in (Refusal.NOT_LABELED, Refusal.OPTED_OUT)
        return (f"enroll {end}: label it {MODE_LABEL}: ambient",) if is_by_label else ()

    def _changes(
        self, verdict: Verdict, connection: Connection, source: _End, target: Workload
    ) -> list[str]:
        """Say what would turn the verdict round."""
        pod = f"{target.namespace}/{target.name}"
        if verdict.basis is Basis.STRICT:
            capture = (f"let {source} exclude it from capture no more",)
            return [
                *(capture if source.is_enrolled else self._how_to_enroll(source)),
                f"let {verdict.policy} say PERMISSIVE for port {connection.port}",
            ]
        if verdict.basis is Basis.NO_POLICY:
            return [f"any ALLOW policy for {pod} would deny what it does not name"]
        if verdict.basis is Basis.RULE:
            word = "deny" if verdict.is_allowed else "allow"
            rest = "no other policy allows it" if verdict.is_allowed else "no other denies it"
            return [f"without {verdict.decided_by} it would {word}, if {rest}"]
        facts = connection.facts()
        advice = [
            f"{policy.key} rules[{rule.position}] would allow it, but for: "
            + ", ".join(clause.field for clause in rule.clauses if not clause.holds(facts))
            for policy in self._rulebook.applying(target.namespace, target.labels)
            if isinstance(policy, Policy) and policy.action is Action.ALLOW
            if not policy.is_dry_run
            for rule in policy.rules
        ]
        principal = facts[0]
        who = f"principal {principal}" if principal else f"address {connection.source}"
        return [*advice[:5], f"an ALLOW rule for {pod} with {who} and port {connection.port}"]

    def _warnings(self, target: Workload) -> list[str]:
        return [
            f"{policy.key}: {warning}"
            for policy in self._rulebook.applying(target.namespace, target.labels)
            for warning in policy.warnings
        ]


def describe_policy(policy: Policy | PeerAuthentication) -> tuple[str, str]:
    """Return what a policy does, and its state."""
    if isinstance(policy, PeerAuthentication):
        ports = [f"{port}={mode}" for port, mode in policy.ports]
        does = ", ".join([str(policy.mode or "UNSET"), *ports])
    else:
        does = policy.action
    if not policy.is_enforced_here:
        return does, "not enforced here"
    is_dry_run = isinstance(policy, Policy) and policy.is_dry_run
    return does, "dry run" if is_dry_run else "in force"


def _named(end: _End, port: int) -> str:
    at = endpoint(str(end.address), port)
    return f"{end} {at}" if end.workload else at


def _unmapped(name: str) -> str:
    """Return the IPv4 address of a v4-mapped one, which is what connect() takes it for."""
    try:
        address = ip_address(name)
    except ValueError:
        return name
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _facing(origins: list[_End], destination: _End) -> _End:
    """Choose the source's address of the destination's family, if it has one."""
    version = destination.address.version
    return next((end for end in origins if end.address.version == version), origins[0])


def _names_of(service: Service) -> set[str]:
    if service.kind == "ServiceEntry":
        return {*service.hosts, f"{service.namespace}/{service.name}"}
    full = f"{service.name}.{service.namespace}.svc"
    short = {service.name, f"{service.namespace}/{service.name}", full.removesuffix(".svc")}
    return short | {full, f"{full}.cluster.local"}

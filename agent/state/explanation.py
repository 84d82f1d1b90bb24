"""Why a connection goes where it goes: path, verdict, who decides, and what would change it. Pure.

    source     destination   path           judged
    enrolled   enrolled      tunnel         at the destination, with the source's identity
    enrolled   enrolled      direct         the same, two pods of one node, from the second on
    other      enrolled      plaintext      at the destination, without an identity
    any        other         passthrough    not at all

`denied` stands for the path if the connection does not come to be. Exclusions and a pod's
connection to itself bypass the mesh. Called for `sidestep explain`; reads the same rulebook as
enforcement.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

from agent.errors import NameUnknown
from agent.model.capture import LISTENER_PORTS
from agent.model.condition import Connection
from agent.model.endpoint import endpoint
from agent.model.policy import Action, PeerAuthentication, Policy
from agent.model.verdict import Basis, Verdict

if TYPE_CHECKING:
    from collections.abc import Set

    from agent.model.identity import SpiffeId
    from agent.model.pod import Address, Exclusions, LocalPod
    from agent.model.service import Service
    from agent.model.workload import Workload
    from agent.state.rulebook import Rulebook
    from agent.state.store import Snapshot

Path = Literal["tunnel", "direct", "plaintext", "passthrough", "denied"]
MODE_HINT = "label it istio.io/dataplane-mode: ambient"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One connection explained; `verdict` None means that nobody judges it."""

    source: str
    destination: str
    path: Path
    reason: str
    verdict: Verdict | None = None
    source_identity: SpiffeId | None = None
    destination_identity: SpiffeId | None = None
    to_change: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def row(self) -> dict[str, object]:
        """Return it as plain values, for an answer or a listing."""
        verdict = self.verdict
        word = None if verdict is None else "allow" if verdict.is_allowed else "deny"
        return {
            "source": self.source,
            "destination": self.destination,
            "path": self.path,
            "verdict": word,
            "decided_by": verdict.decided_by if verdict else None,
            "explained": str(verdict) if verdict else None,
            "reason": self.reason,
            "source_identity": str(self.source_identity) if self.source_identity else None,
            "destination_identity": (
                str(self.destination_identity) if self.destination_identity else None
            ),
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
        unguarded: Set[str] = frozenset(),
    ) -> None:
        """Explain by a state; `unguarded` are the uids of pods that take no direct path for it."""
        self._snapshot = snapshot
        self._rulebook = rulebook
        self._trust_domain = trust_domain
        self._common = common
        self._has_direct_path = has_direct_path
        self._unguarded = unguarded
        self._pods = {pod.uid: pod for pods in snapshot.local_pods.values() for pod in pods}

    def explain(self, source: str, destination: str, port: int) -> list[Explanation]:
        """Explain a connection; one row for each endpoint if the destination is a service.

        Raises:
            NameUnknown: a name is of no pod and no service, or of several.
        """
        origins = self._find_ends(source)
        service = self._find_service(destination)
        if service is None:
            ends = self._find_ends(destination)
            asked = _Asked((ends[0].address,), port)
            return [self._explain(_facing(origins, ends[0]), ends[0], port, asked)]
        targets = service.endpoints_for(port)
        if not targets:
            named = f"service {service.namespace}/{service.name}:{port}"
            detail = "the service has no ready endpoint for this port"
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
        for workload in self._snapshot.workloads:
            if address in workload.addresses:
                return _End(address, workload, self._pods.get(workload.uid))
        return _End(address, None, None)

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
                else f"{name} is no pod, no service and no address that this agent knows"
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
            if wanted in _names_of(service) or wanted in map(str, service.addresses)
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
        named = f"{destination} {endpoint(str(destination.address), port)}"
        is_itself = target is not None and target == source.workload
        if is_itself and destination.address in asked.addresses:  # not by a service
            reason = "a pod's connection to itself stays inside the pod"
            return Explanation(str(source), named, "passthrough", reason)
        network = source.workload.network if source.workload else ""
        if target is not None and source.is_enrolled and target.network != network:
            reason = f"{destination} is in another network, and there is no gateway to it"
            return Explanation(str(source), named, "denied", reason)
        if target is None or not destination.is_enrolled:
            reason = f"{destination} is not in the mesh, so nobody judges who connects"
            hint = (f"enroll {destination}: {MODE_HINT}",) if target is not None else ()
            return Explanation(str(source), named, "passthrough", reason, to_change=hint)
        if port in LISTENER_PORTS:
            reason = f"port {port} is the agent's own"
            return Explanation(str(source), named, "denied", reason)
        is_captured = source.is_enrolled and not self._is_excluded(source, asked)
        if not is_captured and self._is_open(destination, port):
            reason = f"port {port} of {destination} is excluded from capture: plaintext is not seen"
            return Explanation(str(source), named, "passthrough", reason)
        identity = None
        if is_captured and source.workload is not None:
            identity = source.workload.identity(self._trust_domain)
        connection = Connection(source.address, identity, destination.address, port)
        verdict = self._rulebook.judge(target.namespace, target.labels, connection)
        path, reason = self._path(source, destination, is_captured)
        return Explanation(
            str(source),
            named,
            path if verdict.is_allowed else "denied",
            reason,
            verdict,
            identity,
            target.identity(self._trust_domain) if is_captured else None,
            tuple(self._changes(verdict, connection, source, target)),
            tuple(self._warnings(target)),
        )

    def _path(self, source: _End, destination: _End, is_captured: bool) -> tuple[Path, str]:
        if not is_captured:
            if source.is_enrolled:
                return "plaintext", f"{source} excludes this destination from capture"
            return "plaintext", f"{source} is not in the mesh, so it has no identity"
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

    def _changes(
        self, verdict: Verdict, connection: Connection, source: _End, target: Workload
    ) -> list[str]:
        """Say what would turn the verdict round."""
        pod = f"{target.namespace}/{target.name}"
        if verdict.basis is Basis.STRICT:
            return [
                f"enroll {source}: {MODE_HINT}",
                f"or let {verdict.policy} say PERMISSIVE for port {connection.port}",
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

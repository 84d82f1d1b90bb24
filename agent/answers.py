"""What an agent answers: its state, what it knows, what it carries, what differs. Changes nothing.

    the agent's socket     a question by its name, with arguments       Answers.table
    the admin pages        readiness, the configuration in ztunnel's shape

The one exception is `diff` with `repair`, which does again what enrollment has done.

Made by the composition root, which says where the state is; each answer is of plain values, as it
goes out as JSON. Errors are RequestRefused and the others that a person who asks may see.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from agent.config_dump import build_dump
from agent.connections import list_connections
from agent.errors import RequestRefused
from agent.inspection import rows
from agent.model.endpoint import endpoint
from agent.model.workload import owners
from agent.readings import read_gauges
from agent.state.explanation import Explainer
from agent.tunnel.labels import CLUSTER_DOMAIN

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping

    from agent.admin import Question
    from agent.credentials import Credentials
    from agent.direct import DirectPath
    from agent.discovery.source import Source
    from agent.elders import Elders
    from agent.enforcement import Enforcement
    from agent.fleet import Fleet
    from agent.inspection import Inspection
    from agent.roster import Roster
    from agent.settings import Settings
    from agent.state.store import Snapshot

VERSION = version("sidestep")
log = logging.getLogger(__name__)


class Answers:
    """The answers of one agent."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        inspection: Inspection,
        fleet: Fleet,
        roster: Roster,
        direct: DirectPath,
        elders: Elders,
        enforcement: Enforcement,
        credentials: Credentials,
        snapshot: Callable[[], Snapshot],
        is_ready: Callable[[], bool],
        contested: Callable[[], str],
        levels: Callable[[], str],
        metrics_text: Callable[[], Awaitable[bytes]],
        turn: asyncio.Lock,
    ) -> None:
        """Ask nothing yet.

        `snapshot()` is the state that is in force, `is_ready()` whether the first pass over the
        pods is done, `contested()` what others take away from the kernel again and again,
        `levels()` what is logged; `turn` is held while pods are changed.
        """
        self._settings = settings
        self._source = source
        self._inspection = inspection
        self._fleet = fleet
        self._roster = roster
        self._direct = direct
        self._elders = elders
        self._enforcement = enforcement
        self._credentials = credentials
        self._snapshot = snapshot
        self._is_ready = is_ready
        self._contested = contested
        self._levels = levels
        self._metrics_text = metrics_text
        self._turn = turn

    def table(self) -> Mapping[str, Question]:
        """Return the questions by name; `describe` answers the state itself."""
        return {
            "policies": self._list_policies,
            "explain": self._explain,
            "names": self._list_names,
            "connections": self._list_connections,
            "workloads": self._list_workloads,
            "services": self._list_services,
            "diff": self._inspect,
            "metrics": self._tell_metrics,
            "config_dump": self._tell_config,
        }

    def last_table(self) -> Mapping[str, Question]:
        """Return what is still answered when another agent has taken over: its `Elders` ask."""
        return {"connections": self._list_connections, "gauges": self._list_gauges}

    async def _list_policies(self, _arguments: dict[str, Any]) -> object:
        refused: list[dict[str, object]] = [
            {
                "node": self._settings.node,
                "policy": problem.named,
                "does": None,
                "state": "refused",
                "for": None,
                "rules": None,
                "pods": [],
                "warnings": [f"{problem.path}: {problem.detail}"],
            }
            for problem in self._source.problems
            if problem.named.split(" ")[0] in ("AuthorizationPolicy", "PeerAuthentication")
            if not problem.is_partial  # such a one is in force, and says so in its warnings
        ]
        return refused + self._enforcement.list_policies(self._snapshot())

    async def _list_names(self, _arguments: dict[str, Any]) -> object:
        """Tell what is there, and of each pod why it does not want the mesh."""
        snapshot = self._snapshot()
        pods = (*snapshot.workloads, *(each.workload for each in snapshot.starting))
        namespaces = {each.namespace for each in pods}
        namespaces |= {each.namespace for each in snapshot.services}
        namespaces |= {each.key.namespace for each in snapshot.policies}
        return {
            "pods": [
                {
                    "pod": f"{each.namespace}/{each.name}",
                    "node": each.node,
                    "refusal": snapshot.refusals.get(each.uid),
                }
                for each in pods
            ],
            "namespaces": sorted(namespaces),
            "nodes": sorted({self._settings.node, *(each.node for each in pods if each.node)}),
        }

    async def _list_connections(self, arguments: dict[str, Any]) -> object:
        namespace, pod = arguments.get("namespace"), arguments.get("pod")
        found = await list_connections(self._fleet, self._direct, self._elders, namespace, pod)
        node = self._settings.node
        return [{"node": node} | each.row() | {"worker": pid} for pid, each in found]

    async def _list_gauges(self, _arguments: dict[str, Any]) -> object:
        return [gauge for found in await read_gauges(self._fleet) for gauge in found]

    async def _list_workloads(self, _arguments: dict[str, Any]) -> object:
        trust_domain = self._settings.trust_domain
        return [
            {
                "workload": f"{each.namespace}/{each.name}",
                "node": each.node,
                "addresses": [str(address) for address in each.addresses],
                "protocol": "hbone" if each.is_hbone else "tcp",
                "identity": str(each.identity(trust_domain)),
                "network": each.network or None,
                "owner": each.owner or None,
                "labels": dict(sorted(each.labels)),
            }
            for each in self._snapshot().workloads
        ]

    async def _list_services(self, _arguments: dict[str, Any]) -> object:
        snapshot = self._snapshot()
        at = owners(snapshot.workloads)
        rows = []
        for each in snapshot.services:
            pods = [at[found.address] for found in each.endpoints if found.address in at]
            row = {
                "service": f"{each.namespace}/{each.name}",
                "addresses": [str(address) for address in (*each.addresses, *each.balanced)],
                "ports": [port.port for port in each.ports],
                "endpoints": [
                    endpoint(str(address), target)
                    for port in each.ports
                    for address, target in each.endpoints_for(port.port)
                ],
                "pods": sorted({f"{pod.namespace}/{pod.name}" for pod in pods}),
                "nodes": sorted({pod.node for pod in pods}),
            }
            rows.append(row)
        return rows

    async def _inspect(self, arguments: dict[str, Any]) -> object:
        """Compare desired state with what is there, and mend what differs if asked to."""
        # A pass that is not over, or a pod that just comes, would look like a difference.
        if not self._is_ready():
            raise RequestRefused("the first pass over this node's pods is not done; ask again")
        async with self._turn, self._roster.turn:
            if arguments.get("repair"):
                results = await self._inspection.repair()
                for finding, problem in results:
                    fields = {"pod": finding.pod, "what": f"{finding.kind} {finding.name}"}
                    log.warning("repaired", extra=fields | {"problem": problem})
            else:
                results = [(finding, None) for finding in await self._inspection.find()]
        return rows(results, self._settings.node)

    async def _tell_metrics(self, _arguments: dict[str, Any]) -> object:
        return {"text": (await self._metrics_text()).decode()}

    async def _tell_config(self, _arguments: dict[str, Any]) -> object:
        return await self.dump_config()

    async def dump_config(self) -> dict[str, object]:
        """Tell all that is known, in ztunnel's shape; never a key."""
        settings = self._settings
        connections = await list_connections(self._fleet, self._direct, self._elders)
        return build_dump(
            self._snapshot(),
            settings.trust_domain,
            CLUSTER_DOMAIN,
            self._credentials.keeper.kept(),
            [(each.pod, each.state == "enrolled") for each in self._roster.statuses.values()],
            [connection for _pid, connection in connections],
            VERSION,
            {
                "localNode": settings.node,
                "trustDomain": settings.trust_domain,
                "numWorkerThreads": settings.worker_count,
                "caAddress": settings.authority.address,
                "directPath": settings.has_direct_path,
                "logLevels": self._levels(),
            },
        )

    def pending(self) -> dict[str, str]:
        """Name what keeps this agent from being ready; one pod's trouble is not among it."""
        pending = {}
        if not self._is_ready():
            snapshot = self._snapshot()
            known = bool(snapshot.workloads or snapshot.local_pods)
            pending["objects" if not known else "pods"] = (
                "the first pass over this node's pods is not done"
                if known
                else "no state has come from the source of objects"
            )
        if self._contested():
            pending["kernel"] = self._contested()
        missing = self._settings.worker_count - len(self._fleet.pids)
        if missing > 0:
            pending["workers"] = f"{missing} of {self._settings.worker_count} do not run"
        return pending

    async def _explain(self, arguments: dict[str, Any]) -> object:
        explainer = Explainer(
            self._snapshot(),
            self._enforcement.rulebook,
            self._settings.trust_domain,
            self._settings.exclusions,
            self._settings.has_direct_path,
            {
                uid: f"{status.state}: {status.detail}"
                for uid, status in self._roster.statuses.items()
                if status.state != "enrolled"
            },
            self._roster.unguarded(),
        )
        try:
            source, destination = str(arguments["source"]), str(arguments["destination"])
            port = int(arguments["port"])
        except (LookupError, TypeError, ValueError) as error:
            raise RequestRefused("explain needs source, destination and port") from error
        return [each.row() for each in explainer.explain(source, destination, port)]

    def describe(self) -> dict[str, object]:
        """Tell the state: readiness, pods, workers, certificates."""
        return {
            "ready": self._is_ready(),
            "version": VERSION,
            "pending": self.pending(),
            "log_levels": self._levels(),
            "node": self._settings.node,
            "pods": [
                {
                    "uid": status.pod.uid,
                    "namespace": status.pod.namespace,
                    "name": status.pod.name,
                    "state": status.state,
                    "reason": status.reason,
                    "detail": status.detail,
                }
                for status in self._roster.statuses.values()
            ],
            "workers": [{"pid": pid} for pid in self._fleet.pids],
            # Agents before this one that still serve connections.
            "elders": [{"pid": pid} for pid in self._elders.pids],
            "identity": self._credentials.describe(),
        }

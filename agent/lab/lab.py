"""A lab's life: up, down, status, exec.

    /run/sidestep/lab/<name>/objects/      what the agents read
                            /ca/           the certificate authority's key, tokens, roots
                            /logs/         output of agents and pods
                            /<node>/       run directory of the node's agent
                            /cluster.yaml  the description, for commands to come

`up` completes whatever is missing, `down` removes whatever is there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agent import sandbox
from agent.datapath import features, links, pins
from agent.errors import LabError, ManifestError
from agent.lab import machine
from agent.lab.cluster import Cluster, LabNode, LabPod, parse_cluster
from agent.model.enrollment import MODE_LABEL
from agent.question import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

RUN = Path("/run/sidestep/lab")
PINS = Path("/sys/fs/bpf/sidestep-lab")
DEFAULT_CLUSTER = Path(__file__).parents[2] / "deploy/lab/cluster.yaml"
TRUST_DOMAIN = "cluster.local"
CA_HOST = "ca.lab"
CA_PORT = 15012
CERTIFICATE_SECONDS = 24 * 3600
READY_SECONDS = 20.0
LOOK_SECONDS = 0.01
STOP_SECONDS = 10.0
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,19}")
AGENT = ["-m", "agent.cli", "agent"]


class Lab:
    """One lab by name; several do not disturb each other."""

    def __init__(self, name: str, certificate_seconds: int = CERTIFICATE_SECONDS) -> None:
        """Name a lab (LabError for a name that cannot be part of paths; FeatureMissing)."""
        if not NAME.fullmatch(name):
            raise LabError(f"lab name {name!r} is not 1 to 20 of a-z, 0-9 and -")
        features.require_root()
        self.name = name
        self.certificate_seconds = certificate_seconds
        self.run = RUN / name
        self.pins = PINS / name
        self.cgroup = links.cgroup_root() / sandbox.LABS / name
        self.objects = self.run / "objects"
        self.logs = self.run / "logs"
        self.agent_options: tuple[str, ...] = ()  # what `up` adds to each agent's command line
        self.authority = self.run / "ca"
        self._children: list[subprocess.Popen[bytes]] = []  # ours to reap, if down follows here

    # -- names --------------------------------------------------------------------------------

    def netns(self, part: str) -> Path:
        return machine.NETNS_DIRECTORY / f"ss-{self.name}-{part}"

    def node_netns(self, node: LabNode) -> Path:
        return self.netns(f"node-{node.name}")

    def pod_netns(self, pod: LabPod) -> Path:
        return self.netns(f"pod-{pod.namespace}-{pod.name}")

    def pod_cgroups(self, node: LabNode) -> Path:
        return self.cgroup / node.name / "kubepods"

    def kubelet_cgroup(self, node: LabNode) -> Path:
        """Name the cgroup whose processes may probe the pods of a node."""
        return self.cgroup / node.name / "kubelet"

    def pod_cgroup(self, pod: LabPod) -> Path:
        return self.pod_cgroups(pod.node) / f"pod{pod.uid}"

    def admin_socket(self, node: LabNode) -> Path:
        return self.run / node.name / "agent.sock"

    def pod_log(self, pod: LabPod) -> Path:
        return self.logs / f"{pod.namespace}.{pod.name}.log"

    def agent_log(self, node: LabNode) -> Path:
        return self.logs / f"agent-{node.name}.log"

    @property
    def ca_log(self) -> Path:
        return self.logs / "ca.log"

    # -- up -----------------------------------------------------------------------------------

    def load(self, path: Path) -> Cluster:
        """Read a description (ManifestError names file, object and field)."""
        try:
            documents = list(yaml.safe_load_all(path.read_text()))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ManifestError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        return parse_cluster(documents, str(path), self.name)

    def cluster(self) -> Cluster:
        """Return the description of the lab that is up (LabError if none is)."""
        path = self.run / "cluster.yaml"
        if not path.exists():
            raise LabError(f"lab {self.name} is not up: sidestep lab up --name {self.name}")
        return self.load(path)

    def up(self, description: Path, say: Callable[[str], None]) -> Cluster:
        """Bring the lab up, or complete it; `say` gets a line for each stage."""
        cluster = self.load(description)
        for directory in (self.objects, self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        # Objects of a lab that is up are its user's by now: a label that was set stays set.
        text, known = description.read_text(), self.run / "cluster.yaml"
        is_new = not known.exists() or known.read_text() != text
        known.write_text(text)
        for node in cluster.nodes:
            self._give_token(node)
        self._write_tokens(cluster)

        fabric = machine.add_namespace(self.netns("fabric").name)
        machine.address_ca(fabric)
        ca = self.start_ca()
        for node in cluster.nodes:
            path = machine.add_namespace(self.node_netns(node).name)
            machine.connect_node(fabric, node, path)
            (self.cgroup / node.name / "agent").mkdir(parents=True, exist_ok=True)
            self.pod_cgroups(node).mkdir(exist_ok=True)
            self.kubelet_cgroup(node).mkdir(exist_ok=True)
        say(f"{_count(cluster.nodes, 'node')}, routed through one fabric")
        pods = []
        for pod in cluster.pods:
            path = machine.add_namespace(self.pod_netns(pod).name)
            machine.connect_pod(self.node_netns(pod.node), pod, path)
            if not machine.processes_of(self.pod_cgroup(pod)):
                pods.append((pod, self._start_pod(pod)))
        if cluster.pods:
            say(_started(pods, "pod"))
        for body in (*cluster.others, *(pod.manifest() for pod in cluster.pods)):
            if is_new or not self._object_path(body).exists():
                self.write_object(body)
        if ca is not None:
            ca()
            say("the certificate authority signs")
        started = [node for node in cluster.nodes if self.agent_pid(node) is None]
        self._start_agents(started)
        say(_started(started, "agent"))
        for pod, process in pods:
            log = self.pod_log(pod)
            if code := process.poll():
                say(f"warning: pod {pod.key} has ended with exit code {code}, see {log}")
            elif not is_new:
                say(f"warning: pod {pod.key} was not running and is started again, see {log}")
        return cluster

    def write_object(self, body: dict[str, Any]) -> None:
        """Write one object where the agents read it, whole or not at all."""
        path = self._object_path(body)
        draft = path.with_suffix(".draft")
        draft.write_text(yaml.safe_dump(body, sort_keys=False))
        draft.replace(path)

    def remove_object(self, body: dict[str, Any]) -> None:
        """Take one object away again."""
        self._object_path(body).unlink(missing_ok=True)

    def _object_path(self, body: dict[str, Any]) -> Path:
        metadata = body["metadata"]
        parts = (body["kind"].lower(), metadata.get("namespace", "-"), metadata["name"])
        return self.objects / f"{'.'.join(parts)}.yaml"

    def _launch(
        self, netns: Path, cgroup: Path, command: list[str], log: Path, **extra: Any
    ) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "agent.lab.launch", str(netns), str(cgroup), *command]
        with log.open("ab") as output:
            child = subprocess.Popen(
                launcher,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **extra,
            )
        self._children.append(child)
        return child

    def _start_pod(self, pod: LabPod) -> subprocess.Popen[bytes]:
        cgroup = self.pod_cgroup(pod)
        cgroup.mkdir(exist_ok=True)
        return self._launch(self.pod_netns(pod), cgroup, list(pod.command), self.pod_log(pod))

    def label_namespace(self, name: str, mode: str | None) -> float:
        """Set or take the mesh label of a namespace; wait until the agents have followed.

        Returns:
            The seconds that it took.

        Raises:
            LabError: no pod is in that namespace, or one does not follow; names it and says why.
        """
        cluster = self.cluster()
        if not any(pod.namespace == name for pod in cluster.pods):
            known = ", ".join(sorted({pod.namespace for pod in cluster.pods}))
            raise LabError(f"no pod is in namespace {name}; the namespaces are {known}")
        # A pod that opts out by a label of its own does not follow its namespace.
        pods = {
            pod.uid: pod
            for pod in cluster.pods
            if pod.namespace == name
            and MODE_LABEL not in (pod.body["metadata"].get("labels") or {})
        }
        wanted = "enrolled" if mode == "ambient" else None
        watches = []
        for node in cluster.nodes:
            watch = self.agent_states(node)
            watches.append((watch, next(watch), [uid for uid in pods if pods[uid].node == node]))
        began = time.monotonic()
        labels = {} if mode is None else {MODE_LABEL: mode}
        metadata = {"name": name, "labels": labels}
        self.write_object({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        for watch, state, uids in watches:
            # No change is told where nothing had to change.
            while late := _late(state, uids, wanted):
                try:
                    state = next(watch)
                except (LabError, StopIteration) as error:
                    detail = "; ".join(f"{pods[uid].key} {text}" for uid, text in late.items())
                    raise LabError(f"not all pods of {name} have followed: {detail}") from error
        protocol = "tcp" if mode is None else "hbone"
        for node in cluster.nodes:
            self._wait_until_known(node, {pod.key for pod in pods.values()}, protocol)
        return time.monotonic() - began

    def _wait_until_known(self, node: LabNode, pods: set[str], protocol: str) -> None:
        """Wait until a node's agent knows how pods are reached, which their own agents tell it."""
        until = time.monotonic() + READY_SECONDS
        while True:
            rows = ask(self.admin_socket(node), "workloads")
            late = pods - {row["workload"] for row in rows if row["protocol"] == protocol}
            if not late:
                return
            if time.monotonic() > until:
                named = ", ".join(sorted(late))
                raise LabError(
                    f"the agent of node {node.name} does not reach by {protocol}: {named}"
                )
            time.sleep(LOOK_SECONDS)

    def restart_agent(self, node: LabNode) -> None:
        """Stop a node's agent as an operator would, and start it anew."""
        self.stop_agent(node)
        self._start_agents([node])

    def stop_agent(self, node: LabNode) -> None:
        """Stop a node's agent; its pods stay captured, with nobody listening."""
        processes = self.agent_processes(node)
        for agent in _find_agents(processes):
            os.kill(agent, signal.SIGTERM)  # its children end with it
        for pid in processes:
            machine.wait_for_exit(pid, STOP_SECONDS)

    def upgrade_agent(
        self, node: LabNode, tree: Path | None = None, ready_seconds: float = READY_SECONDS
    ) -> int:
        """Start an agent beside the one that runs, and wait until it has taken over.

        Args:
            tree: the directory with the sources of its version; those of this one by default.

        Returns:
            The process of the agent before it, which serves what is open until that has ended.

        Raises:
            LabError: none runs, or the new one does not take over.
        """
        before = self.agent_pid(node)
        if before is None:
            raise LabError(f"no agent runs on node {node.name}")
        self._start_agents([node], tree, ready_seconds)
        return before

    # -- the certificate authority ------------------------------------------------------------

    def _give_token(self, node: LabNode) -> None:
        run = self.run / node.name
        run.mkdir(exist_ok=True, mode=0o700)
        if not (run / "token").exists():
            with os.fdopen(os.open(run / "token", CREATE, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))

    def _write_tokens(self, cluster: Cluster) -> None:
        self.authority.mkdir(exist_ok=True, mode=0o700)
        draft = self.authority / "tokens.draft"
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, CREATE, 0o600), "w") as file:
            for node in cluster.nodes:
                file.write(f"{(self.run / node.name / 'token').read_text()} {node.name}\n")
        draft.replace(self.authority / "tokens")

    def ca_pids(self) -> list[int]:
        """List the processes of the CA."""
        return machine.processes_of(self.cgroup / "ca")

    def start_ca(self) -> Callable[[], None] | None:
        """Start the CA, unless it runs; returns what waits until it serves."""
        (self.cgroup / "ca").mkdir(parents=True, exist_ok=True)
        if self.ca_pids():
            return None
        ready = _bind_notify(self.authority)
        command = [
            sys.executable, "-m", "agent.cli", "ca",
            "--directory", str(self.authority),
            "--objects", str(self.objects),
            "--tokens", str(self.authority / "tokens"),
            "--listen", f"{machine.CA_ADDRESS}:{CA_PORT}",
            "--host", CA_HOST,
            "--trust-domain", TRUST_DOMAIN,
            "--longest", str(self.certificate_seconds),
        ]  # fmt: skip
        process = self._launch(
            self.netns("fabric"),
            self.cgroup / "ca",
            command,
            self.ca_log,
            env=os.environ | {"NOTIFY_SOCKET": str(self.authority / "notify.sock")},
        )

        def wait() -> None:
            with ready:
                self._wait_ready("the certificate authority", self.ca_log, ready, process)

        return wait

    def agent_processes(self, node: LabNode) -> list[int]:
        """List the processes of an agent: itself, its workers, a child that comes and goes."""
        return machine.processes_of(self.cgroup / node.name / "agent")

    def agent_pid(self, node: LabNode) -> int | None:
        """Return the process of a node's agent, the youngest if one hands over to another."""
        agents = _find_agents(self.agent_processes(node))
        return agents[-1] if agents else None

    def _start_agents(
        self,
        nodes: list[LabNode],
        tree: Path | None = None,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        waiting: list[tuple[LabNode, socket.socket, subprocess.Popen[bytes]]] = []
        try:
            for node in nodes:
                run = self.run / node.name
                ready = _bind_notify(run)
                command = [
                    sys.executable, *AGENT,
                    "--node", node.name,
                    "--objects", str(self.objects),
                    "--run-dir", str(run),
                    "--pins", str(self.pins / node.name),
                    "--pod-cgroups", str(self.pod_cgroups(node)),
                    "--kubelet-cgroup", str(self.kubelet_cgroup(node)),
                    "--ca", f"{machine.CA_ADDRESS}:{CA_PORT}",
                    "--ca-name", CA_HOST,
                    "--ca-token", str(run / "token"),
                    "--ca-root", str(self.authority / "root-cert.pem"),
                    "--certificate-lifetime", str(self.certificate_seconds),
                    "--crl", str(self.authority / "revoked.pem"),
                    "--trust-domain", TRUST_DOMAIN,
                    *self.agent_options,
                ]  # fmt: skip
                process = self._launch(
                    self.node_netns(node),
                    self.cgroup / node.name / "agent",
                    command,
                    self.agent_log(node),
                    env=os.environ | {"NOTIFY_SOCKET": str(run / "notify.sock")},
                    cwd=tree,
                )
                waiting.append((node, ready, process))
            for node, ready, process in waiting:
                named = f"the agent of node {node.name}"
                self._wait_ready(named, self.agent_log(node), ready, process, ready_seconds)
        finally:
            for _node, ready, _process in waiting:
                ready.close()

    def _wait_ready(
        self,
        named: str,
        log: Path,
        ready: socket.socket,
        process: subprocess.Popen[bytes],
        seconds: float = READY_SECONDS,
    ) -> None:
        pidfd = os.pidfd_open(process.pid)
        try:
            found = select.select([ready.fileno(), pidfd], [], [], seconds)[0]
        finally:
            os.close(pidfd)
        if ready.fileno() not in found:
            raise LabError(f"{named} did not become ready:\n{log.read_text()[-2000:]}")

    # -- what is there ------------------------------------------------------------------------

    def agent_states(self, node: LabNode, command: str = "watch") -> Iterator[dict[str, Any]]:
        """Yield the agent's state now and at each change (LabError if it does not answer)."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(READY_SECONDS)
            try:
                connection.connect(str(self.admin_socket(node)))
                connection.sendall(json.dumps({"command": command}).encode() + b"\n")
                with connection.makefile("r") as lines:
                    for line in lines:
                        yield json.loads(line)
            except OSError as error:
                raise LabError(f"the agent of node {node.name} does not answer: {error}") from error

    def status(self) -> list[dict[str, object]]:
        """List the pods: where they are, their addresses, their place in the mesh."""
        cluster = self.cluster()
        mesh: dict[str, str] = {}
        for node in cluster.nodes:
            try:
                state = next(self.agent_states(node, "state"))
            except LabError:
                for pod in cluster.pods:
                    if pod.node == node:
                        mesh[pod.uid] = "agent down"
                continue
            mesh |= {pod["uid"]: pod["state"] for pod in state["pods"]}
        return [
            {
                "pod": pod.key,
                "node": pod.node.name,
                "address": str(pod.address4),
                "address6": str(pod.address6),
                "processes": machine.processes_of(self.pod_cgroup(pod)),
                "mesh": mesh.get(pod.uid, "none"),
            }
            for pod in cluster.pods
        ]

    def find_pod(self, wanted: str) -> LabPod:
        """Return a pod by `name` or `namespace/name` (LabError lists the pods)."""
        pods = self.cluster().pods
        found = [pod for pod in pods if wanted in (pod.name, pod.key)]
        if len(found) != 1:
            known = ", ".join(pod.key for pod in pods)
            raise LabError(f"there is no single pod {wanted}; the pods are {known}")
        return found[0]

    def command_in(self, pod: LabPod, command: list[str]) -> list[str]:
        """Return the command line that runs `command` inside a pod."""
        launcher = [sys.executable, "-m", "agent.lab.launch"]
        return [*launcher, str(self.pod_netns(pod)), str(self.pod_cgroup(pod)), *command]

    # -- down ---------------------------------------------------------------------------------

    def places(self) -> list[Path]:
        """List what is on the machine of this lab: files, pins, cgroup, namespaces."""
        namespaces = [
            path
            for path in machine.NETNS_DIRECTORY.glob(f"ss-{self.name}-*")
            if self._is_ours(path.name)
        ]
        return [path for path in (self.run, self.pins, self.cgroup) if path.exists()] + namespaces

    def down(self) -> bool:
        """Remove everything that is there; False if there was nothing."""
        found = self.places()
        # At once: an agent that ends in order would leave the same, and serve what is open first.
        for child in self._children:  # first: one that has just been launched is in no cgroup yet
            child.kill()
            child.wait(STOP_SECONDS)
        self._children.clear()
        machine.kill_cgroup(self.cgroup)
        for path in found:
            if path.parent == machine.NETNS_DIRECTORY:
                machine.delete_namespace(path)
        for directory in self.pins.glob("*/*") if self.pins.exists() else ():
            pins.remove(directory)
        shutil.rmtree(self.pins, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)
        for parent in (self.cgroup.parent, PINS, RUN, RUN.parent):
            try:
                parent.rmdir()
            except OSError:
                continue  # another lab, or an agent, still uses it
        return bool(found)

    def _is_ours(self, name: str) -> bool:
        # `a` and `a-b` are both names of labs: ss-a-b-fabric belongs to the second.
        return re.fullmatch(rf"ss-{self.name}-(fabric|node-.*|pod-.*)", name) is not None


def _count(things: Collection[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _started(things: Collection[object], noun: str) -> str:
    return f"{_count(things, noun)} started" if things else f"{noun}s already running"


def _find_agents(pids: list[int]) -> list[int]:
    """Return those that are agents and no children of one, the youngest last."""
    commands = {pid: machine.command_of(pid) for pid in pids}
    agents = [pid for pid, command in commands.items() if command[1:4] == AGENT]
    # A child that has not yet become its own program still has its parent's command line.
    found = [pid for pid in agents if machine.parent_of(pid) not in agents]
    return sorted(found, key=machine.started_at)


def _late(state: dict[str, Any], uids: list[str], wanted: str | None) -> dict[str, str]:
    """Say of the pods that are not in the wanted state how they are."""
    found = {pod["uid"]: pod for pod in state["pods"]}
    return {
        uid: "is {state}: {detail}".format(**found[uid]) if uid in found else "is out of the mesh"
        for uid in uids
        if (found[uid]["state"] if uid in found else None) != wanted
    }


def _bind_notify(directory: Path) -> socket.socket:
    """Return a socket for the word of a process that it is ready."""
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    path = directory / "notify.sock"
    path.unlink(missing_ok=True)
    ready.bind(str(path))
    return ready

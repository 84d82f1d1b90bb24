"""A lab with every path in it.

    east: plain-client, plain-near    west: plain-far     no mesh, on one node and across
          mesh-client, mesh-near            mesh-far      in the mesh
          envoy-client                      envoy-far     an Envoy in each pod's namespace
          ztunnel-client                    ztunnel-far   a ztunnel likewise, where there is one

Each server pod runs the same two servers. Envoys and ztunnels are in cgroups of their own, as our
agents are, so that the kernel accounts what each mesh uses and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from agent import netns
from agent.bench import envoy, ztunnel
from agent.bench.results import PathName, Place
from agent.bench.servers import (
    ENVOY_SIGN,
    Server,
    envoy_command,
    hand_over,
    listen_for_ztunnel,
    write_credentials,
)
from agent.errors import LabError
from agent.identity.local import LocalAuthority
from agent.lab import machine
from agent.lab.lab import CA_HOST, CA_PORT
from agent.model.identity import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.bench.measures import Plan
    from agent.bench.tools import Tools
    from agent.lab.cluster import LabPod
    from agent.lab.lab import Lab

WIRE_PORT, HTTP_PORT, HBONE_PORT = 7000, 7080, 15008
PODS = {
    "plain-client": ("east", "plain"),
    "plain-near": ("east", "plain"),
    "plain-far": ("west", "plain"),
    "mesh-client": ("east", "mesh"),
    "mesh-near": ("east", "mesh"),
    "mesh-far": ("west", "mesh"),
    "envoy-client": ("east", "plain"),
    "envoy-far": ("west", "plain"),
    "ztunnel-client": ("east", "plain"),
    "ztunnel-far": ("west", "plain"),
}
TRUST_DOMAIN = "cluster.local"


@dataclass(frozen=True, slots=True)
class Way:
    """One path: from which pod to what address, and whose work it is."""

    place: Place
    client: LabPod
    address: str
    meshes: tuple[Path, ...]  # cgroups of the mesh processes

    def cpu_seconds(self) -> float:
        """Return what the mesh processes used so far."""
        used = 0
        for cgroup in self.meshes:
            first = (cgroup / "cpu.stat").read_text().split("\n", 1)[0]
            used += int(first.removeprefix("usage_usec "))
        return used / 1e6

    def resident_kib(self) -> int:
        """Return the resident memory of the mesh processes."""
        total = 0
        for cgroup in self.meshes:
            for pid in machine.processes_of(cgroup):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if "VmRSS" in line)
        return total


def describe(names: Iterable[str]) -> str:
    """Return the objects of a lab with these of PODS, as YAML."""
    objects: list[dict[str, object]] = [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        for name in ("east", "west")
    ]
    for name, labels in (("plain", {}), ("mesh", {"istio.io/dataplane-mode": "ambient"})):
        metadata = {"name": name, "labels": labels}
        objects.append({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    objects += [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"nodeName": node, "serviceAccountName": name},
        }
        for name, (node, namespace) in PODS.items()
        if name in names
    ]
    return yaml.safe_dump_all(objects, sort_keys=False)


class Ground:
    """The lab while it is up; `ways` lists what can be measured."""

    def __init__(self, lab: Lab, tools: Tools, directory: Path, plan: Plan) -> None:
        self.tools = tools
        self._plan = plan
        self._lab = lab
        self._directory = directory
        self._stack = ExitStack()
        self.ways: list[Way] = []

    def __enter__(self) -> Ground:
        self._stack.callback(self._lab.down)
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        lab = self._lab
        description = self._directory / "cluster.yaml"
        has_ztunnels = self.tools.ztunnel is not None
        description.write_text(
            describe([name for name in PODS if has_ztunnels or not name.startswith("ztunnel")])
        )
        cluster = lab.up(description, lambda _line: None)
        pods = {pod.name: pod for pod in cluster.pods}
        for pod in (pod for name, pod in pods.items() if not name.endswith("client")):
            self._start(pod, "servers", [str(self.tools.wire), "serve", str(WIRE_PORT)], "ready")
            if self.tools.fortio:
                command = [
                    str(self.tools.fortio), "server", "-http-port", str(HTTP_PORT),
                    "-grpc-port", "disabled", "-tcp-port", "disabled", "-udp-port", "disabled",
                    "-redirect-port", "disabled",
                ]  # fmt: skip
                self._start(pod, "servers", command, "server listening on tcp")
        if self.tools.envoy is not None and "envoy" in self._plan.paths:
            self._start_envoys(self.tools.envoy, pods["envoy-client"], pods["envoy-far"])
        if self.tools.ztunnel is not None:
            self._start_ztunnels(self.tools.ztunnel, pods["ztunnel-client"], pods["ztunnel-far"])
        self._wait_enrolled({pod.uid for pod in cluster.pods if pod.namespace == "mesh"})

        agents = tuple(lab.cgroup / node.name / "agent" for node in cluster.nodes)

        def pair(name: str) -> tuple[Path, ...]:
            return tuple(lab.pod_cgroup(pods[f"{name}-{end}"]) / name for end in ("client", "far"))

        listed: tuple[tuple[PathName, str, str, tuple[Path, ...]], ...] = (
            ("no-mesh", "plain-client", "plain-near", ()),
            ("no-mesh", "plain-client", "plain-far", ()),
            ("same-node", "mesh-client", "mesh-near", agents[:1]),
            ("cross-node", "mesh-client", "mesh-far", agents),
            ("envoy", "envoy-client", "envoy-far", pair("envoy")),
        )
        if has_ztunnels:
            listed += (("ztunnel", "ztunnel-client", "ztunnel-far", pair("ztunnel")),)
        for path, client, server, meshes in listed:
            # An Envoy has no capture: the client speaks to its listener.
            address = "127.0.0.1" if path == "envoy" else str(pods[server].address4)
            place = Place(path, pods[client].node == pods[server].node)
            if self._plan.has_place(place):
                self.ways.append(Way(place, pods[client], address, meshes))

    def command_in(self, pod: LabPod, *command: str) -> list[str]:
        """Return the command line that runs a load generator in a pod."""
        return self._lab.command_in(pod, list(command))

    def _start(self, pod: LabPod, group: str, command: list[str], sign: str) -> None:
        """Start a server in a pod and wait until it writes `sign`."""
        cgroup = self._lab.pod_cgroup(pod) / group
        cgroup.mkdir(exist_ok=True)
        launcher = [sys.executable, "-m", "agent.lab.launch", str(self._lab.pod_netns(pod))]
        server = Server([*launcher, str(cgroup), *command], sign)
        self._stack.callback(server.stop)

    def _start_ztunnels(self, program: Path, client: LabPod, server: LabPod) -> None:
        state = self._directory / "ztunnel.yaml"
        state.write_text(yaml.safe_dump(ztunnel.build_state((client, server), TRUST_DOMAIN)))
        for pod in (client, server):
            zds = self._directory / f"{pod.name}.sock"
            authority = ztunnel.Authority(
                f"{machine.CA_ADDRESS}:{CA_PORT}",
                CA_HOST,
                self._lab.authority / "root-cert.pem",
                self._lab.run / pod.node.name / "token",
            )
            settings = ztunnel.environment(pod, state, zds, authority)
            words = [f"{name}={value}" for name, value in settings.items()]
            with listen_for_ztunnel(zds) as listener:
                self._start(pod, "ztunnel", ["env", *words, str(program)], ztunnel.SIGN)
                fd = netns.open_netns(self._lab.pod_netns(pod))
                try:
                    told = hand_over(listener, pod, fd)
                except OSError as error:
                    raise LabError(f"{program} does not serve {pod.key}: {error}") from error
                finally:
                    os.close(fd)
            self._stack.callback(told.close)
        rules = ztunnel.build_capture(str(server.address4), (WIRE_PORT, HTTP_PORT))
        command = self.command_in(client, "nft", "-f", "-")
        done = subprocess.run(command, input=rules, text=True, capture_output=True, check=False)
        if done.returncode:
            raise LabError(f"nft does not take the capture of a ztunnel: {done.stderr}")

    def _start_envoys(self, program: Path, client: LabPod, server: LabPod) -> None:
        authority = LocalAuthority.create(self._directory / "ca", TRUST_DOMAIN)
        client_id, server_id = (
            SpiffeId(TRUST_DOMAIN, pod.namespace, pod.name) for pod in (client, server)
        )
        credentials = []
        for own, peer in ((client_id, server_id), (server_id, client_id)):
            credentials.append(write_credentials(authority, own, peer, self._directory))
        ports = (WIRE_PORT, HTTP_PORT)
        far = str(server.address4)
        configs = (
            (
                server,
                envoy.build_server(
                    (far, HBONE_PORT),
                    [(f"{far}:{port}", (far, port)) for port in ports],
                    credentials[1],
                ),
            ),
            (
                client,
                envoy.build_client(
                    (far, HBONE_PORT),
                    [(port, f"{far}:{port}") for port in ports],
                    credentials[0],
                ),
            ),
        )
        for pod, config in configs:
            path = self._directory / f"{pod.name}.yaml"
            path.write_text(yaml.safe_dump(config))
            self._start(pod, "envoy", envoy_command(program, path), ENVOY_SIGN)

    def _wait_enrolled(self, wanted: set[str]) -> None:
        for node in self._lab.cluster().nodes:
            for state in self._lab.agent_states(node):
                pods = {pod["uid"]: pod["state"] for pod in state["pods"]}
                if all(pods.get(uid, "enrolled") == "enrolled" for uid in wanted) and pods:
                    break

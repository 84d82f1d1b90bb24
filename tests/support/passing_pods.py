"""Pods that come to a lab and leave it, as a runtime and an API server would have it."""

from __future__ import annotations

import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.lab import machine
from agent.lab.cluster import LabPod

if TYPE_CHECKING:
    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

FIRST_NUMBER = 100  # of an address; those of the lab's own pods are lower


@dataclass(frozen=True)
class PassingPod:
    """One pod of the namespace shop, which is enrolled by its namespace's label."""

    lab: Lab
    pod: LabPod

    @staticmethod
    def make(lab: Lab, node: LabNode, number: int, *command: str) -> PassingPod:
        """Name a pod; its address comes again after a hundred others."""
        name = f"passing-{number}"
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"nodeName": node.name, "serviceAccountName": "passing"},
        }
        place = FIRST_NUMBER + number % 100
        return PassingPod(lab, LabPod(str(uuid.uuid4()), "shop", name, node, place, command, body))

    def come(self) -> None:
        """Make the sandbox, start the program, and tell the agents."""
        lab, pod = self.lab, self.pod
        path = lab.pod_netns(pod)
        link = f"pod{pod.number}"
        node = pod.node
        node_netns = lab.node_netns(node).name
        _ip(
            f"netns add {path.name}",
            f"-n {path.name} link set lo up",
            f"-n {node_netns} link add {link} type veth peer name eth0 netns {path.name}",
            f"-n {node_netns} address add {node.gateway4} dev {link}",
            f"-n {node_netns} link set {link} up",
            f"-n {node_netns} route add {pod.address4} dev {link}",
            f"-n {path.name} address add {pod.address4} dev eth0",
            f"-n {path.name} link set eth0 up",
            f"-n {path.name} route add {node.gateway4} dev eth0",
            f"-n {path.name} route add default via {node.gateway4}",
        )
        cgroup = lab.pod_cgroup(pod)
        cgroup.mkdir()
        script = f'echo 0 > {cgroup}/cgroup.procs; exec nsenter --net={path} "$@"'
        subprocess.Popen(["sh", "-c", script, "pod", *pod.command], stderr=subprocess.DEVNULL)
        lab.write_object(pod.manifest())

    def go(self) -> None:
        """End its processes and its sandbox, then tell the agents."""
        machine.kill_cgroup(self.lab.pod_cgroup(self.pod))
        machine.delete_namespace(self.lab.pod_netns(self.pod))
        self.lab.remove_object(self.pod.manifest())


def _ip(*lines: str) -> None:
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)

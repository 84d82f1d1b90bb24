"""Pods that come to a lab and leave it, as a runtime and an API server would have it."""

from __future__ import annotations

import subprocess
import uuid
from typing import TYPE_CHECKING

from agent.lab import machine
from agent.lab.cluster import LabPod

if TYPE_CHECKING:
    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

FIRST_NUMBER = 100  # of an address; those of the lab's own pods are lower
END_SECONDS = 5.0


class PassingPod:
    """One pod of the namespace shop, which is enrolled by its namespace's label.

    What a runtime does in C is done by ip(8) and nsenter(1), since many pods are made in a minute.
    """

    def __init__(self, lab: Lab, node: LabNode, number: int, *command: str) -> None:
        """Name a pod; its address comes again after a hundred others."""
        self._lab = lab
        name = f"passing-{number}"
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"nodeName": node.name, "serviceAccountName": "passing"},
        }
        place = FIRST_NUMBER + number % 100
        self.pod = LabPod(str(uuid.uuid4()), "shop", name, node, place, command, body)
        self._processes: list[subprocess.Popen[bytes]] = []

    def come(self) -> None:
        """Make the sandbox, start the program, and tell the agents."""
        pod, link = self.pod, f"pod{self.pod.number}"
        path = machine.add_namespace(self._lab.pod_netns(pod).name)
        _ip(
            self._lab.node_netns(pod.node).name,
            f"link add {link} type veth peer name eth0 netns {path.name}",
            f"address add {pod.node.gateway4} dev {link}",
            f"link set {link} up",
            f"route add {pod.address4} dev {link}",
        )
        _ip(
            path.name,
            f"address add {pod.address4} dev eth0",
            "link set eth0 up",
            f"route add {pod.node.gateway4} dev eth0",
            f"route add default via {pod.node.gateway4}",
        )
        self._lab.pod_cgroup(pod).mkdir()
        self.run(*pod.command)
        self._lab.write_object(pod.manifest())

    def run(self, *command: str) -> None:
        """Start a program inside."""
        script = 'echo 0 > "$0"/cgroup.procs; exec nsenter --net="$@"'
        place = (str(self._lab.pod_cgroup(self.pod)), str(self._lab.pod_netns(self.pod)))
        self._processes.append(
            subprocess.Popen(
                ["sh", "-c", script, *place, *command],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def go(self) -> None:
        """End its processes and its sandbox, then tell the agents; no error if it is gone."""
        machine.kill_cgroup(self._lab.pod_cgroup(self.pod))
        for process in self._processes:
            process.wait(END_SECONDS)
        self._processes.clear()
        machine.delete_namespace(self._lab.pod_netns(self.pod))
        self._lab.remove_object(self.pod.manifest())


def _ip(netns: str, *lines: str) -> None:
    batch = "\n".join(lines).encode()
    subprocess.run(["ip", "-n", netns, "-batch", "-"], input=batch, check=True)

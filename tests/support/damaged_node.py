"""A node of a lab whose kernel state somebody changes behind the agent's back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_interface
from typing import TYPE_CHECKING, Any

from agent import netlink, netns, sock_diag
from agent.datapath import pins, records
from agent.enroll import REPLY_SYSCTLS
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.model.capture import HBONE_PORT
from tests.support.labs import PodEnd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.datapath.maps import Record


class Node:
    """The first node of a lab, and ways to look at it."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        self.node = lab.cluster().nodes[0]
        self.client = PodEnd(lab, "client", stack)
        self.server = PodEnd(lab, "server", stack)
        (directory,) = (lab.pins / self.node.name).iterdir()
        self.pins = pins.Pins(directory)
        stack.callback(self.pins.close)
        fd = netns.open_netns(lab.pod_netns(self.client.pod))
        stack.callback(os.close, fd)
        self.netns_fd = fd
        self.cookie = netns.netns_cookie(fd)

    def inside(self, function: Any) -> Any:
        return netns.run_in(self.netns_fd, function)

    def link(self, prefix: str, pod: str = "client") -> Path:
        fd = netns.open_netns(self.lab.pod_netns(self.lab.find_pod(pod)))
        try:
            cookie = netns.netns_cookie(fd)
        finally:
            os.close(fd)
        (path,) = self.pins.link_path("").glob(f"{prefix}_{cookie}*")
        return path

    def command(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        line = [sys.executable, "-m", "agent.cli", *arguments, "--lab", self.lab.name]
        done = subprocess.run([*line, "-o", "json"], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, list(json.loads(done.stdout))


@contextmanager
def open_node(*agent_options: str) -> Iterator[Node]:
    """Bring up a lab whose agents have these options; the server echoes on 9000."""
    with ExitStack() as stack:
        lab = Lab(f"t{os.getpid()}")
        lab.agent_options = agent_options
        stack.callback(lab.down)
        lab.up(DEFAULT_CLUSTER, print)
        lab.label_namespace("shop", "ambient")
        made = Node(lab, stack)
        made.server.echo(9000)
        yield made


def delete_pod(node: Node) -> None:
    node.pins.maps["ss_pods"].delete({"value": node.cookie})


def add_exception(node: Node) -> None:
    key = records.port_key(node.cookie, 9000, records.OUTBOUND)
    node.pins.maps["ss_ports"].put(key, {"value": 1})


def make_strict(node: Node) -> None:
    maps = node.pins.maps
    record = maps["ss_pods"].get({"value": node.cookie})
    assert record is not None
    maps["ss_pods"].put({"value": node.cookie}, record | {"is_strict": 1})


def steal_address(node: Node) -> None:
    key: Record = {"address": records.pack_address(node.client.pod.address4)}
    node.pins.maps["ss_local"].put(key, {"netns_cookie": 1})


def clear_slot(node: Node) -> None:
    node.pins.maps["ss_listeners"].delete({"value": node.cookie})


def add_service(node: Node) -> None:
    key = records.service_port_key(node.client.pod.address4, 1)
    node.pins.maps["ss_services"].put(key, {"value": 3})


def remove_lookup(node: Node) -> None:
    node.link("lookup").unlink()


def remove_guard(node: Node) -> None:
    node.link("guard_out").unlink()


def remove_connect(node: Node) -> None:
    node.pins.link_path("ss_connect4").unlink()


def remove_map_pin(node: Node) -> None:
    (node.pins.directory / "maps" / "ss_pods").unlink()


def remove_reply_route(node: Node) -> None:
    node.inside(partial(netlink.delete_reply_route, socket.AF_INET))


def reset_sysctl(node: Node) -> None:
    node.inside(lambda: REPLY_SYSCTLS[0].write_text("0"))


def add_address(node: Node) -> None:
    """Give the pod an address that guard does not know."""
    node.inside(lambda: netlink.add_address("lo", ip_interface("10.78.9.9/32")))


def destroy_listener(node: Node) -> None:
    def destroy() -> None:
        for found in list(sock_diag.list_tcp(sock_diag.LISTENING_STATE)):
            if found.local[1] == HBONE_PORT:
                assert sock_diag.destroy_found(found)

    node.inside(destroy)

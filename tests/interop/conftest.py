"""One pod in the mesh, served by our worker, and an Envoy in the other namespace."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.bench.servers import ENVOY_SIGN, Server, envoy_command, write_credentials
from agent.bench.tools import find_envoy
from agent.datapath import links
from agent.enroll import enroll, unenroll
from agent.identity.local import LocalAuthority
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.identity import SpiffeId
from agent.model.pod import LocalPod
from agent.model.workload import Workload
from agent.tunnel import messages
from tests.node.conftest import (
    TRUST_DOMAIN,
    MeshPod,
    RunningWorker,
    certificate_for,
    listener_message,
    serve,
)
from tests.support.namespaces import PEER4, PEER6, POD4, POD6, Namespace, Network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.bench.envoy import Credentials
    from agent.datapath import pins

__all__ = ["serve"]
ADDRESSES = {"client": (POD4, POD6), "server": (PEER4, PEER6)}


def identity(name: str) -> SpiffeId:
    return SpiffeId(TRUST_DOMAIN, "default", name)


def workload(name: str) -> Workload:
    parsed = tuple(ip_address(address) for address in ADDRESSES[name])
    return Workload(f"uid-{name}", "default", name, name, name, parsed, is_hbone=True)


@dataclass
class Neighbors:
    """`ours` is in the mesh, `theirs` has room for an Envoy."""

    ours: MeshPod
    theirs: Namespace
    authority: LocalAuthority
    directory: Path
    stack: ExitStack
    start_worker: Callable[[str], RunningWorker]  # one more for the same pod; its log's name

    def credentials(
        self, own: SpiffeId, peer: SpiffeId, authority: LocalAuthority | None = None
    ) -> Credentials:
        return write_credentials(authority or self.authority, own, peer, self.directory)

    def start_envoy(self, config: dict[str, Any]) -> None:
        path = self.directory / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        netns = f"/proc/{os.getpid()}/fd/{self.theirs.fd}"
        launcher = [sys.executable, "-m", "agent.lab.launch", netns, str(links.cgroup_root())]
        envoy = Server([*launcher, *envoy_command(find_envoy(), path)], ENVOY_SIGN)
        self.stack.callback(envoy.stop)


@contextmanager
def make_neighbors(
    loaded: pins.Pins,
    network: Network,
    tmp_path: Path,
    name: str,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Iterator[Neighbors]:
    """Enroll the pod `name` with a worker of its own; the other has neither."""
    namespaces = {"client": network.pod, "server": network.peer}
    (other,) = namespaces.keys() - {name}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = LocalAuthority.create(directory / "ca", TRUST_DOMAIN)
        own = workload(name)
        pod = LocalPod(own.uid, "default", name, name, own.addresses)
        enrollment = enroll(loaded, pod, namespaces[name].fd)
        stack.callback(unenroll, enrollment)

        def start_worker(log: str) -> RunningWorker:
            worker = RunningWorker(tmp_path / f"{log}.log")
            stack.callback(worker.stop)
            worker.tell(
                messages.Configure(str(loaded.directory), TRUST_DOMAIN, bounds=bounds),
                certificate_for(authority, identity(name)),
                messages.PutWorkload(own),
                messages.PutWorkload(workload(other)),
            )
            message, fds = listener_message(enrollment)
            messages.Outbox(worker.channel).put(message, fds)
            worker.settle()
            return worker

        worker = start_worker(name)
        ours = MeshPod(namespaces[name], enrollment, worker, own)
        yield Neighbors(ours, namespaces[other], authority, directory, stack, start_worker)
        print(worker.log.read_text())  # noqa: T201  # shown by pytest on failure


@pytest.fixture
def bounds() -> Bounds:
    """Return the limits of our worker; a test that wants others says so by a parameter."""
    return DEFAULT_BOUNDS


@pytest.fixture
def server(
    loaded: pins.Pins, network: Network, tmp_path: Path, bounds: Bounds
) -> Iterator[Neighbors]:
    """Our worker serves the server; the client is for an Envoy."""
    with make_neighbors(loaded, network, tmp_path, "server", bounds) as made:
        yield made


@pytest.fixture
def client(
    loaded: pins.Pins, network: Network, tmp_path: Path, bounds: Bounds
) -> Iterator[Neighbors]:
    """Our worker serves the client; the server is for an Envoy."""
    with make_neighbors(loaded, network, tmp_path, "client", bounds) as made:
        yield made

"""One API server for the whole run; a namespace of its own for each test that wants one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.api_server import BUILD, ApiServer, Store, write_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = BUILD.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the API server and its store keep what they have."""
    made = tmp_path_factory.mktemp("cluster")
    write_secrets(made)
    return made


@pytest.fixture(scope="session")
def store(directory: Path) -> Iterator[Store]:
    """Return the store."""
    started = Store(directory)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def programs() -> Path:
    """Return where Kubernetes' programs are; `make test-cluster` has built them."""
    built = subprocess.run([BUILD], check=True, capture_output=True, text=True)
    return Path(built.stdout.strip())


@pytest.fixture(scope="session")
def binary(programs: Path) -> str:
    """Return the API server's program."""
    return str(programs / "kube-apiserver")


@pytest.fixture(scope="session")
def api_server(directory: Path, store: Store, binary: str) -> Iterator[ApiServer]:
    """Return the API server that most tests share; who kills it starts it again."""
    server = ApiServer(directory, store.url, binary)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def second_server(directory: Path, store: Store, binary: str) -> Iterator[ApiServer]:
    """Return another API server on the same store, started by the test."""
    server = ApiServer(directory, store.url, binary)
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _pods_of_the_node_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Agents of other tests call their node the same, and would look for these pods."""
    yield
    if "api_server" not in request.fixturenames:
        return
    server: ApiServer = request.getfixturevalue("api_server")
    here = "fieldSelector=spec.nodeName%3Dnode-1"
    for pod in server.must("GET", f"/api/v1/pods?{here}")["items"]:
        place = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods"
        server.must("DELETE", f"{place}/{pod['metadata']['name']}", {"gracePeriodSeconds": 0})

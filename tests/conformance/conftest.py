"""One worker for all rules of a side: what a peer did to its tunnel must not reach the next one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.interop.conftest import make_neighbors
from tests.support.namespaces import make_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath import pins
    from tests.interop.conftest import Neighbors


@pytest.fixture(scope="module")
def server(loaded: pins.Pins, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbors]:
    """Our worker serves the server's 15008."""
    path = tmp_path_factory.mktemp("server")
    with make_network() as network, make_neighbors(loaded, network, path, "server") as made:
        yield made


@pytest.fixture(scope="module")
def client(loaded: pins.Pins, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbors]:
    """Our worker serves the client, who dials a 15008 that the test has made."""
    path = tmp_path_factory.mktemp("client")
    with make_network() as network, make_neighbors(loaded, network, path, "client") as made:
        yield made

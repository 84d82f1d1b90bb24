"""A worker that ends: what it has promised is delivered first."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from agent.tunnel.connection import Role
from agent.tunnel.session import Session
from agent.worker import Worker
from tests.support.loop import PATIENCE_SECONDS, run_until
from tests.support.tunnel import CLIENT, SERVER, Authority, Witness, make_session
from tests.support.wire import tcp_pair

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("has_successor", [True, False])
def test_worker_that_retires_waits_for_its_tunnels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_successor: bool
) -> None:
    """One may hold the last bytes of a connection that is complete for both applications."""
    monkeypatch.setattr(Session, "open_count", 0)
    authority = Authority(tmp_path)
    ours, theirs = tcp_pair()
    own, control = socket.socketpair()
    with own, control:
        worker = Worker(own)
        reactor = worker._reactor
        client = Witness(
            make_session(reactor, ours, authority.context(CLIENT, Role.CLIENT), Role.CLIENT)
        )
        server = Witness(
            make_session(reactor, theirs, authority.context(SERVER, Role.SERVER), Role.SERVER)
        )
        run_until(reactor, lambda: client.is_ready and server.is_ready)
        worker._retire(has_successor)
        enough = reactor.call_later(0.3, reactor.stop)
        reactor.run()
        assert enough.callback is None  # so it was this that stopped it
        client.session.close()
        too_long = reactor.call_later(PATIENCE_SECONDS, reactor.stop)
        reactor.run()
        assert too_long.callback is not None
        assert Session.open_count == 0

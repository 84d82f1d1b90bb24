"""A pod's listener over real connections, also where the process can open no more files."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent.tunnel import listening as listening_module
from agent.tunnel.listening import ACCEPTS_PER_TURN, Listening
from agent.tunnel.reactor import Reactor
from tests.support.descriptors import descriptors_left
from tests.support.loop import count_rounds, run_rounds, run_until

if TYPE_CHECKING:
    from collections.abc import Iterator


class Scene:
    """A listener and its clients."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.reactor = Reactor()
        own = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
        self.address = own.getsockname()
        self.accepted: list[socket.socket] = []
        self.failures: list[OSError] = []
        self.listening = Listening(self.reactor, own, self._serve, self.failures.append)

    def _serve(self, accepted: socket.socket, _peer: tuple[str, int]) -> None:
        self.accepted.append(self._stack.enter_context(accepted))

    def connect(self, count: int = 1) -> None:
        for _ in range(count):
            self._stack.enter_context(socket.create_connection(self.address))


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(stack)


def test_connection_is_served_without_blocking(scene: Scene) -> None:
    scene.connect()
    run_until(scene.reactor, lambda: scene.accepted)
    assert not scene.accepted[0].getblocking()


def test_others_get_their_turn_while_many_wait(scene: Scene) -> None:
    scene.connect(ACCEPTS_PER_TURN + 1)
    run_rounds(scene.reactor, 1)
    assert len(scene.accepted) == ACCEPTS_PER_TURN
    run_until(scene.reactor, lambda: len(scene.accepted) == ACCEPTS_PER_TURN + 1)


def test_queue_is_served_whole_at_the_end(scene: Scene) -> None:
    scene.connect(ACCEPTS_PER_TURN + 1)
    scene.listening.serve_queue()
    assert len(scene.accepted) == ACCEPTS_PER_TURN + 1


def test_process_without_descriptors_rests_and_serves_what_waits_when_it_has_some(
    scene: Scene,
) -> None:
    scene.connect(3)
    with descriptors_left(1):
        assert count_rounds(scene.reactor, 0.35) < 12
        assert len(scene.accepted) == 1
        assert [error.errno for error in scene.failures] == [errno.EMFILE]
    run_until(scene.reactor, lambda: len(scene.accepted) == 3)
    scene.connect()
    with descriptors_left(0):
        run_until(scene.reactor, lambda: len(scene.failures) == 2)  # said again: it had worked


def test_listener_that_is_closed_at_rest_stays_closed(scene: Scene) -> None:
    scene.connect()
    with descriptors_left(0):
        run_until(scene.reactor, lambda: scene.failures)
        scene.listening.close()
    count_rounds(scene.reactor, 2 * listening_module.REST_SECONDS)
    assert scene.accepted == []

"""Traffic that runs while something happens to the mesh, and counts what went wrong.

    connects   one connection after the other: connect, say a word, hear it, end
    streams    connections that stay, each saying a word now and then
    bulk       one connection that sends without a pause; the server tells the digest at its end

Each kind is a thread; `stop` ends them and returns what they saw.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.labs import SECONDS, is_alive

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from tests.support.labs import PodEnd

ECHO_PORT, BULK_PORT = 9000, 9001
WORD_SECONDS = 0.02  # between two words of a stream
# So that traffic takes no processor from what it watches.
CONNECT_SECONDS, BULK_SECONDS = 0.01, 0.02
PATTERN = os.urandom(1 << 20)


@dataclass
class Seen:
    """What one kind of traffic saw; moments are of time.monotonic()."""

    good: list[float] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)

    def gap(self) -> float:
        """Return the longest time between two successes, in seconds."""
        pairs = zip(self.good, self.good[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)

    def longest_wait(self, since: float) -> float:
        """Return the seconds from `since` to the first success after the last failure."""
        last = max((moment for moment, _text in self.failed if moment >= since), default=since)
        return min((moment for moment in self.good if moment > last), default=float("inf")) - since


class Load:
    """Traffic from one pod to another; the destination serves it as well."""

    def __init__(
        self,
        client: PodEnd,
        server: PodEnd,
        stack: ExitStack,
        patience_seconds: float = SECONDS,
    ) -> None:
        """Serve in `server`'s pod until `stack` ends; nothing is sent yet.

        A new connection gives up after `patience_seconds`.
        """
        self._client, self._server, self._stack = client, server, stack
        self._patience_seconds = patience_seconds
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.connects, self.streams, self.bulk = Seen(), Seen(), Seen()
        self.sent_bytes = 0
        server.echo(ECHO_PORT)
        self._serve_bulk()
        stack.callback(self.stop)  # before the servers, which wait for their clients

    def _serve_bulk(self) -> None:
        def take(accepted: socket.socket) -> None:
            digest = hashlib.sha256()
            with accepted, contextlib.suppress(OSError):
                while data := accepted.recv(1 << 20):
                    digest.update(data)
                accepted.sendall(digest.digest())

        self._server.serve(BULK_PORT, take)

    def start(self, *, streams: int = 4, has_bulk: bool = True) -> None:
        """Send from now on."""
        for _ in range(streams):
            self._run(self._stream)
        if has_bulk:
            self._run(self._bulk)
        self._run(self._connect)

    def _run(self, loop: Callable[[], None]) -> None:
        thread = threading.Thread(target=loop)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End all traffic; what was seen stays."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _connect(self) -> None:
        while not self._stop.is_set():
            try:
                patience = self._patience_seconds
                with self._client.open(self._server.address, ECHO_PORT, patience) as connection:
                    if not is_alive(connection):
                        raise ConnectionResetError("no echo")
            except OSError as error:
                self.connects.failed.append((time.monotonic(), repr(error)))
                self._stop.wait(WORD_SECONDS)
            else:
                self.connects.good.append(time.monotonic())
                self._stop.wait(CONNECT_SECONDS)

    def _stream(self) -> None:
        try:
            with self._client.open(self._server.address, ECHO_PORT) as connection:
                while not self._stop.wait(WORD_SECONDS):
                    if not is_alive(connection, b"word" * 100):
                        raise ConnectionResetError("no echo")
                    self.streams.good.append(time.monotonic())
        except OSError as error:
            self.streams.failed.append((time.monotonic(), repr(error)))

    def _bulk(self) -> None:
        digest = hashlib.sha256()
        try:
            with self._client.open(self._server.address, BULK_PORT) as connection:
                while not self._stop.is_set():
                    connection.sendall(PATTERN)
                    digest.update(PATTERN)
                    self.sent_bytes += len(PATTERN)
                    self.bulk.good.append(time.monotonic())
                    self._stop.wait(BULK_SECONDS)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(32, socket.MSG_WAITALL)
                if answer != digest.digest():
                    raise ConnectionResetError(f"another digest, {len(answer)} bytes of it")
        except OSError as error:
            self.bulk.failed.append((time.monotonic(), repr(error)))

"""Start a server and wait until it says that it serves; what Envoys and ztunnels need for that."""

from __future__ import annotations

import socket
import subprocess
import threading
from typing import IO, TYPE_CHECKING

from agent.bench import envoy, ztunnel
from agent.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path

    from agent.identity.local import LocalAuthority
    from agent.lab.cluster import LabPod
    from agent.model.identity import SpiffeId

READY_SECONDS = 20.0
ZDS_SECONDS = 20.0
# By then its sockets listen; "starting workers" comes a moment before that.
ENVOY_SIGN = "starting main dispatch loop"


def envoy_command(program: Path, config: Path) -> list[str]:
    """Return the command line of an Envoy that says ENVOY_SIGN when it serves."""
    quiet = [
        "-l",
        "error",
        "--component-log-level",
        "main:info",
        "--disable-hot-restart",
    ]
    return [str(program), "-c", str(config), *quiet]


def write_credentials(
    authority: LocalAuthority, own: SpiffeId, peer: SpiffeId, directory: Path
) -> envoy.Credentials:
    """Issue a certificate and write it where an Envoy reads it."""
    issued = authority.issue(own)
    paths = {}
    for kind, text in (("chain", issued.chain), ("key", issued.key), ("roots", issued.roots)):
        path = directory / f"{own.service_account}.{kind}.pem"
        path.write_bytes(text)
        paths[kind] = str(path)
    return envoy.Credentials(paths["chain"], paths["key"], paths["roots"], str(peer))


class _Output:
    """Reads all that a server writes, so that it never waits for us, and looks for one line."""

    def __init__(self, stream: IO[str], sign: str) -> None:
        self._stream = stream
        self._sign = sign
        self._last: list[str] = []
        self._found = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            self._last = [*self._last[-20:], line]
            if self._sign in line:
                self._found.set()
        self._is_over = True
        self._found.set()

    def wait(self, command: list[str]) -> None:
        """Wait for the sign (LabError with the last lines if it does not come)."""
        if not self._found.wait(READY_SECONDS) or self._is_over:
            raise LabError(f"{' '.join(command)} did not become ready:\n{''.join(self._last)}")

    def join(self) -> None:
        """Wait for the end of the output."""
        self._thread.join()
        self._stream.close()


class Server:
    """A running server; `stop` ends it and waits."""

    def __init__(self, command: list[str], sign: str) -> None:
        """Start it and wait for `sign` in its output (LabError if that does not come)."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = _Output(self._process.stdout, sign)
        try:
            self._output.wait(command)
        except LabError:
            self.stop()
            raise

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._output.join()


def listen_for_ztunnel(path: Path) -> socket.socket:
    """Return the socket that a ztunnel will look for."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(ZDS_SECONDS)
    return listener


def hand_over(listener: socket.socket, pod: LabPod, netns_fd: int) -> socket.socket:
    """Tell the ztunnel of its pod; it serves it as long as the returned socket is open.

    Raises:
        OSError: it does not come, or does not accept the pod.
    """
    connection, _ = listener.accept()
    connection.settimeout(ZDS_SECONDS)
    connection.recv(1024)  # hello
    for message, fds in ((ztunnel.build_add(pod), [netns_fd]), (ztunnel.SNAPSHOT_SENT, [])):
        socket.send_fds(connection, [message], fds)
        answer = connection.recv(1024)
        if answer != ztunnel.ACK:
            connection.close()
            raise OSError(f"it refuses the pod: {answer!r}")
    return connection

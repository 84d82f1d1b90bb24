"""The real CA process on this machine, over real gRPC and TLS."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

HOST = "ca.test"
NODE_TOKENS = {"east": "token-of-node-east-1", "west": "token-of-node-west-2"}
READY_SECONDS = 20.0


class CaProcess:
    """A CA below one directory, listening on a unix socket there."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.objects = directory / "objects"
        self.objects.mkdir(exist_ok=True)
        self.keep = directory / "ca"
        self.tokens = directory / "tokens"
        if not self.tokens.exists():
            self.tokens.write_text(
                "".join(f"{token} {node}\n" for node, token in NODE_TOKENS.items())
            )
            self.tokens.chmod(0o600)
        self.log = directory / "ca.log"
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix:{self.directory}/ca.sock"

    @property
    def roots(self) -> Path:
        return self.keep / "root-cert.pem"

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "agent.cli", "ca",
            "--directory", str(self.keep),
            "--objects", str(self.objects),
            "--tokens", str(self.tokens),
            "--listen", self.address,
            "--host", HOST,
            *self._options,
        ]  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it serves."""
        notify = self.directory / "notify.sock"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self.log.open("ab") as log:
            ready.bind(str(notify))
            self.process = subprocess.Popen(
                self.command(), stderr=log, env=os.environ | {"NOTIFY_SOCKET": str(notify)}
            )
            pidfd = os.pidfd_open(self.process.pid)
            try:
                found = select.select([ready.fileno(), pidfd], [], [], READY_SECONDS)[0]
            finally:
                os.close(pidfd)
            assert ready.fileno() in found, self.log.read_text()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(10)
        self.process = None
        return code

    def add_pod(self, node: str, namespace: str, account: str, number: int = 1) -> None:
        """Write a pod that is scheduled on a node."""
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{account}-{number}",
                "namespace": namespace,
                "uid": f"{namespace}-{account}-{number}",
            },
            "spec": {"nodeName": node, "serviceAccountName": account},
            "status": {"podIP": f"10.0.{number // 250}.{number % 250 + 1}"},
        }
        path = self.objects / f"{namespace}.{account}.{number}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(body))
        draft.replace(path)

    def entries(self, message: str) -> list[dict[str, Any]]:
        """Return the log lines with a message."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["message"] == message]

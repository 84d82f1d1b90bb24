"""Constant traffic between two pods, and what became of it.

    python -m tests.support.traffic serve PORT         echo whatever comes
    python -m tests.support.traffic drive HOST PORT    until stdin ends, then one line of JSON

`drive` opens one connection after the other, and holds one open through all of it. It needs the
standard library only, since it runs as the program of a pod.
"""

from __future__ import annotations

import json
import select
import socket
import socketserver
import sys
import time

PAYLOAD = b"x" * 2000
PATIENCE_SECONDS = 10.0


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def serve(port: int) -> None:
    """Echo for ever."""
    with _Server(("", port), _Echo) as server:
        server.serve_forever()


def exchange(connection: socket.socket) -> None:
    """Send and receive once (OSError if not all comes back)."""
    connection.sendall(PAYLOAD)
    left = len(PAYLOAD)
    while left:
        received = len(connection.recv(left))
        if not received:
            raise ConnectionError("the connection ended early")
        left -= received


def drive(host: str, port: int) -> dict[str, object]:
    """Exchange until stdin ends."""
    done = 0
    failures: list[str] = []
    began = time.monotonic()

    def result() -> dict[str, object]:
        seconds = round(time.monotonic() - began, 1)
        return {"done": done, "seconds": seconds, "failures": failures}

    with socket.create_connection((host, port), PATIENCE_SECONDS) as lasting:
        while not select.select([sys.stdin], [], [], 0.01)[0]:
            for kind in ("short", "lasting"):
                try:
                    if kind == "lasting":
                        exchange(lasting)
                    else:
                        with socket.create_connection((host, port), PATIENCE_SECONDS) as short:
                            exchange(short)
                    done += 1
                except OSError as error:
                    failures.append(f"{kind} after {time.monotonic() - began:.1f} s: {error}")
                    if kind == "lasting":
                        return result()
    return result()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(drive(sys.argv[2], int(sys.argv[3]))))  # noqa: T201

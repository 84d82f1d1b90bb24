"""A little of the Kubernetes API over real HTTP: token reviews, pods, Secrets with versions."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from kubernetes import client

if TYPE_CHECKING:
    from collections.abc import Iterator

Body = dict[str, Any]


class KubeApi:
    """What the API server knows."""

    def __init__(self) -> None:
        self.users: dict[str, Body] = {}  # by token: status.user
        self.audiences: dict[str, list[str]] = {}  # by token
        self.objects: dict[str, Body] = {}  # by path
        self.requests: list[str] = []
        self.is_broken = False
        self._version = 0

    def answer(self, method: str, path: str, body: Body) -> tuple[int, Body]:
        """Answer one request as the API server does."""
        self.requests.append(f"{method} {path}")
        if self.is_broken:
            return 500, {}
        if path == "/apis/authentication.k8s.io/v1/tokenreviews":
            return 201, body | {"status": self._review(body["spec"])}
        if method == "POST":
            path += f"/{body['metadata']['name']}"
            if path in self.objects:
                return 409, {"reason": "AlreadyExists"}
        known = self.objects.get(path)
        if known is None and method != "POST":
            return 404, {"reason": "NotFound"}
        if method == "PUT" and known is not None:
            version = body["metadata"].get("resourceVersion")
            if version != known["metadata"]["resourceVersion"]:
                return 409, {"reason": "Conflict"}
        if method != "GET":
            self.put(path, body)
        return 200, self.objects[path]

    def put(self, path: str, body: Body) -> None:
        """Keep an object, in a new version."""
        self._version += 1
        metadata = body["metadata"] | {"resourceVersion": str(self._version)}
        self.objects[path] = body | {"metadata": metadata}

    def _review(self, spec: Body) -> Body:
        user = self.users.get(spec["token"])
        audiences = [name for name in spec["audiences"] if name in self.audiences[spec["token"]]] \
            if user else []  # fmt: skip
        if user is None or not audiences:
            return {"authenticated": False, "error": "the token is not known"}
        return {"authenticated": True, "user": user, "audiences": audiences}


@contextmanager
def serving(api: KubeApi) -> Iterator[client.ApiClient]:
    """Serve it on loopback and yield a client of it."""

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            status, answer = api.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _serve  # http.server's names

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    configuration = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    configuration.retries = 0
    try:
        with client.ApiClient(configuration) as made:
            yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

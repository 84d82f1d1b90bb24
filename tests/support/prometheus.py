"""A real Prometheus, which scrapes what a test serves, and answers queries."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PROMETHEUS = Path(sys.executable).parent / "prometheus"  # `make setup` puts it there
START_SECONDS = 20.0
ANSWER_SECONDS = 5.0


class Prometheus:
    """One that runs."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **fields: str) -> Any:
        """Return what a question of its API gets (URLError)."""
        url = f"{self._url}/api/v1/{path}?{urlencode(fields)}"
        with urlopen(url, timeout=ANSWER_SECONDS) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression, now."""
        return list(self.ask("query", query=expression)["result"])

    def wait_until_ready(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.ask("query", query="1")
            except URLError:
                assert time.monotonic() < deadline, "Prometheus does not answer"
                time.sleep(0.05)
            else:
                return


@contextmanager
def served(pages: Mapping[str, Callable[[], bytes]]) -> Iterator[int]:
    """Serve each page as http://127.0.0.1:PORT/NAME."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages[self.path.removeprefix("/")]()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def prometheus(
    directory: Path, pages: Mapping[str, Callable[[], bytes]], rules: Path
) -> Iterator[Prometheus]:
    """Run one that scrapes `pages` each second and evaluates `rules` as often."""
    with served(pages) as source:
        targets = [f"127.0.0.1:{source}"]
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {
                    "job_name": name,
                    "metrics_path": f"/{name}",
                    "static_configs": [{"targets": targets}],
                    "relabel_configs": [{"target_label": "instance", "replacement": name}],
                }
                for name in pages
            ],
        }
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        port = free_port()
        command = [
            str(PROMETHEUS), f"--config.file={directory}/prometheus.yaml",
            f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with (
            (directory / "log").open("wb") as log,
            subprocess.Popen(command, stderr=log) as process,
        ):
            try:
                found = Prometheus(port)
                found.wait_until_ready()
                yield found
            finally:
                process.terminate()
                process.wait(START_SECONDS)

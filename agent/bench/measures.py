"""What is measured: one cell is one load on one way, and gives one or more samples."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.bench.ground import HTTP_PORT, WIRE_PORT
from agent.bench.results import Sample
from agent.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.bench.ground import Ground, Way
    from agent.bench.results import PathName, Place

CONNECT_CLIENTS = 16
CONNECTIONS = 64
RATE = 1000
BODY_BYTES = 1024
CELL_SECONDS = 60.0  # more than any cell takes


PATHS: tuple[PathName, ...] = ("no-mesh", "same-node", "cross-node", "envoy")
MEASURES = ("memory", "round-trip", "requests", "bulk", "connects")


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often, and what of it."""

    rounds: int = 5
    seconds: float = 2.0
    idle_connections: int = 10_000
    paths: tuple[str, ...] = PATHS
    measures: tuple[str, ...] = MEASURES

    def has_place(self, place: Place) -> bool:
        """Whether a path is measured; without the mesh, what the others are compared with."""
        if place.path != "no-mesh":
            return place.path in self.paths
        others = ("same-node",) if place.is_local else ("cross-node", "envoy", "ztunnel")
        return "no-mesh" in self.paths and (
            self.paths == ("no-mesh",) or any(path in self.paths for path in others)
        )


QUICK = Plan(rounds=5, seconds=0.2, idle_connections=2000)


def _run(ground: Ground, way: Way, *command: str) -> dict[str, Any]:
    line = ground.command_in(way.client, *command)
    done = subprocess.run(line, capture_output=True, text=True, timeout=CELL_SECONDS, check=False)
    try:
        parsed: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        parsed = {}
    if done.returncode or not parsed:
        where = f"{way.place.path} from {way.client.name} to {way.address}"
        raise LabError(f"{' '.join(command)} failed ({where}): {done.stderr[-1000:]}")
    return parsed


def _wire(ground: Ground, way: Way, kind: str, *words: object) -> dict[str, Any]:
    program = str(ground.tools.wire)
    return _run(ground, way, program, kind, way.address, str(WIRE_PORT), *map(str, words))


class Cells:
    """The cells of a round, in order; each is run on one way after the other."""

    def __init__(self, ground: Ground, plan: Plan) -> None:
        self._ground = ground
        self._seconds = plan.seconds
        cells: tuple[tuple[str, Callable[[Way], Iterator[Sample]]], ...] = (
            ("round-trip", lambda way: self._round_trips(way, 128)),
            ("round-trip", lambda way: self._round_trips(way, 16 << 10)),
            ("requests", lambda way: self._requests(way, None)),
            ("requests", lambda way: self._requests(way, RATE)),
            ("bulk", lambda way: self._bulk(way, 1)),
            ("bulk", lambda way: self._bulk(way, 8)),
            ("connects", self._connects),
        )
        self.all = tuple(cell for measure, cell in cells if measure in plan.measures)

    def _round_trips(self, way: Way, size: int) -> Iterator[Sample]:
        found = _wire(self._ground, way, "rtt", self._seconds, size)
        given = {"size": size, "connections": 1}
        yield Sample(way.place, "rtt_p50_us", given, found["p50_us"])
        yield Sample(way.place, "rtt_p99_us", given, found["p99_us"])

    def _requests(self, way: Way, rate: int | None) -> Iterator[Sample]:
        used = way.cpu_seconds()
        count, per_second, p50, p99 = self._fortio(way, rate)
        used = way.cpu_seconds() - used
        given = {"size": BODY_BYTES, "connections": CONNECTIONS}
        if rate is not None:
            given["rate"] = rate
        else:
            yield Sample(way.place, "requests_per_second", given, per_second)
        yield Sample(way.place, "rtt_p50_us", given, p50)
        yield Sample(way.place, "rtt_p99_us", given, p99)
        if way.meshes:
            yield Sample(way.place, "cpu_s_per_1000_requests", given, used / count * 1000)

    def _fortio(self, way: Way, rate: int | None) -> tuple[int, float, float, float]:
        if self._ground.tools.fortio is None:
            found = _wire(
                self._ground, way, "requests", self._seconds, CONNECTIONS, BODY_BYTES, rate or 0
            )
            return found["count"], found["per_second"], found["p50_us"], found["p99_us"]
        found = _run(
            self._ground, way, str(self._ground.tools.fortio), "load", "-quiet", "-json", "-",
            "-c", str(CONNECTIONS), "-qps", str(rate or 0), "-t", f"{self._seconds}s",
            "-nocatchup", "-uniform", "-r", "0.00001", "-p", "50,99",
            f"http://{way.address}:{HTTP_PORT}/echo?size={BODY_BYTES}",
        )  # fmt: skip
        histogram = found["DurationHistogram"]
        p50, p99 = (entry["Value"] * 1e6 for entry in histogram["Percentiles"])
        failed = histogram["Count"] - found["RetCodes"].get("200", 0)
        if failed:
            raise LabError(f"{failed} requests failed on {way.place.path}: {found['RetCodes']}")
        return histogram["Count"], found["ActualQPS"], p50, p99

    def _bulk(self, way: Way, streams: int) -> Iterator[Sample]:
        used = way.cpu_seconds()
        found = _wire(self._ground, way, "bulk", self._seconds, streams)
        used = way.cpu_seconds() - used
        given = {"streams": streams}
        yield Sample(way.place, "bulk_gbit_s", given, found["gbit_s"])
        if way.meshes:
            yield Sample(way.place, "cpu_s_per_gb", given, used / (found["bytes"] / 1e9))

    def _connects(self, way: Way) -> Iterator[Sample]:
        found = _wire(self._ground, way, "connect", self._seconds, CONNECT_CLIENTS)
        given = {"size": 64, "connections": CONNECT_CLIENTS}
        yield Sample(way.place, "connections_per_second", given, found["per_second"])


def measure_memory(ground: Ground, way: Way, count: int) -> Iterator[Sample]:
    """Yield the mesh's memory with nothing to do, and with `count` connections that do nothing."""
    _wire(ground, way, "rtt", 0.1, 128)  # a tunnel is there, as on a node in use
    idle = way.resident_kib()
    yield Sample(way.place, "rss_mib", {}, idle / 1024)
    words = (str(ground.tools.wire), "idle", way.address, str(WIRE_PORT), str(count))
    child = subprocess.Popen(
        ground.command_in(way.client, *words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        if f'"count": {count}' not in child.stdout.readline():
            raise LabError(f"{count} connections could not be opened on {way.place.path}")
        given = {"connections": count}
        value = (way.resident_kib() - idle) / count
        yield Sample(way.place, "idle_kib_per_connection", given, value)
    finally:
        child.communicate()

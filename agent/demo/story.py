"""What the demo does and proves, stage by stage.

    lab up -> plain request -> one label -> the same request -> one policy, and one less
           -> look into the kernel -> one label less -> plain request -> lab down

Each claim is decided here, from what was measured in this run; a claim that is false does not stop
the story. The screen shows it; nothing here knows how.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent.datapath import listing
from agent.demo import evidence, wire
from agent.demo.recorder import Recorder
from agent.errors import LabError
from agent.lab import machine
from agent.lab.lab import CA_PORT, DEFAULT_CLUSTER, TRUST_DOMAIN, Lab
from agent.model.capture import HBONE_PORT
from agent.model.endpoint import endpoint
from agent.model.enrollment import MODE_LABEL
from agent.model.identity import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.demo.wire import Direction
    from agent.lab.cluster import LabPod

NAMESPACE, CLIENT, SERVER, NEIGHBOR, PORT = "shop", "shop/client", "shop/server", "shop/cache", 8080
DOCUMENT = "BSD"
LINK = "node1"  # of the fabric, towards the client's node: what an eavesdropper would tap
CURL_REPORT = "%{stderr}%{remote_ip} %{remote_port} %{http_code} %{time_total}"
# A connection opened now, used later, by a shell: two lines of an unmodified program.
LATE_REQUEST = (
    "exec 3<>/dev/tcp/{host}/{port}; echo open; read; "
    f"printf 'GET /{DOCUMENT} HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
)
# A connection that nobody uses: it ends when somebody closes it.
IDLE_CONNECTION = "exec 3<>/dev/tcp/{host}/{port}; echo open; cat <&3"
POLICY: dict[str, Any] = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "no-client", "namespace": NAMESPACE},
    "spec": {
        "action": "DENY",
        "rules": [{"from": [{"source": {"serviceAccounts": [CLIENT]}}]}],
    },
}

Row = dict[str, object]


class Screen(Protocol):
    """Shows the story as it goes."""

    def stage(self, title: str) -> None:
        """Begin a stage."""
        ...

    def note(self, text: str) -> None:
        """Say one thing that happened."""
        ...

    def table(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        """Show rows."""
        ...

    def bytes(self, title: str, data: bytes) -> None:
        """Show the start of what was on the wire."""
        ...


@dataclass
class Report:
    """What was found: the claims, each in a sentence, and what they rest on."""

    claims: dict[str, bool] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def is_proven(self) -> bool:
        """Whether every claim holds."""
        return all(self.claims.values())


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of the client, and what went over the link meanwhile."""

    body: bytes
    peer: str
    milliseconds: float
    streams: dict[Direction, bytes]  # whatever the link carried

    @property
    def own(self) -> dict[Direction, bytes]:
        """The streams but the CA's, whom agents ask whenever they need a certificate."""
        authority = (machine.CA_ADDRESS, CA_PORT)
        return {
            way: stream
            for way, stream in self.streams.items()
            if authority not in ((str(host), port) for host, port in way.ends)
        }

    @property
    def line(self) -> bytes:
        """The longest line of the answer: what to look for on the wire."""
        return max(self.body.splitlines(), key=len)

    def shows(self, text: bytes) -> bool:
        """Say whether `text` could be read on the link."""
        return any(text in stream for stream in self.streams.values())

    def answer(self) -> tuple[Direction, bytes]:
        """Return the direction in which the answer came, in whatever form (LabError: none)."""
        server = self.peer.rpartition(":")[0]
        found = [(way, stream) for way, stream in self.own.items() if str(way.source) == server]
        if not found:
            raise LabError(f"nothing from {server} has passed the link")
        return max(found, key=lambda item: len(item[1]))

    def is_all_on(self, port: int) -> bool:
        """Say whether nothing went over the link but what had `port` at one of its ends."""
        return all(port in (end for _host, end in way.ends) for way in self.own)


class Story:
    """Tells one demo on one lab, and takes it down whatever happens."""

    def __init__(self, lab: Lab, screen: Screen, cluster: Path = DEFAULT_CLUSTER) -> None:
        """Prepare a story; `cluster` describes the pods of the default lab, if changed."""
        self._lab = lab
        self._description = cluster
        self._screen = screen
        self._report = Report()

    def tell(self) -> Report:
        """Run it all (SidestepError where the machine does not allow it)."""
        began = time.monotonic()
        self._lab.down()  # what a killed demo left
        try:
            with ExitStack() as stack:
                self._up(stack)
                self._before(stack)
                self._enroll()
                self._after()
                self._visit_the_neighbor()
                self._deny(stack)
                self._look_into_the_kernel()
                self._unenroll()
            self._screen.stage("Down again")
        finally:
            self._lab.down()
        left = ", ".join(map(str, self._lab.places()))
        self._claim("nothing_left_behind", "nothing of the demo is left on this machine", not left)
        self._screen.note(f"left on this machine: {left or 'nothing'}")
        self._report.evidence["seconds"] = round(time.monotonic() - began, 1)
        return self._report

    def _claim(self, name: str, sentence: str, holds: bool) -> None:
        self._report.claims[name] = holds
        self._report.sentences[name] = sentence

    # -- stages -------------------------------------------------------------------------------

    def _up(self, stack: ExitStack) -> None:
        self._screen.stage("A cluster on this machine, out of network namespaces")
        cluster = self._lab.up(self._description, self._screen.note)
        self._client, self._server, self._neighbor = (
            self._lab.find_pod(name) for name in (CLIENT, SERVER, NEIGHBOR)
        )
        self._screen.table(
            ("pod", "node", "address", "program"),
            [
                {
                    "pod": pod.key,
                    "node": pod.node.name,
                    "address": str(pod.address4),
                    "program": " ".join(pod.command),
                }
                for pod in cluster.pods
            ],
        )
        own = Path("/proc/self/ns/net")
        self._namespaces = [own, *machine.NETNS_DIRECTORY.glob(f"ss-{self._lab.name}-*")]
        self._recorder = stack.enter_context(Recorder(self._lab.netns("fabric"), LINK))
        self._logs = {
            pod.key: evidence.AccessLog(self._lab.agent_log(pod.node))
            for pod in (self._client, self._server)
        }

    def _before(self, stack: ExitStack) -> None:
        self._screen.stage("Before: anybody on the link can read along")
        pids = [
            pid
            for pod in (self._client, self._server, self._neighbor)
            for pid in machine.processes_of(self._lab.pod_cgroup(pod))
        ]
        self._starts = evidence.process_starts(pids)
        self._filters = evidence.read_filters(self._namespaces)
        visit = self._plain = self._visit(self._server)
        self._late = self._open(stack, LATE_REQUEST, self._server)
        self._recorder.take()
        direction, stream = visit.answer()
        self._screen.note(self._summary(visit))
        start = max(0, stream.find(visit.line))
        self._screen.bytes(f"on the link: {_name(direction)}", stream[start:])
        self._claim(
            "payload_readable_before",
            "before, the answer could be read on the link",
            visit.shows(visit.line),
        )
        self._report.evidence["readable_line"] = visit.line.decode(errors="replace").strip()

    def _enroll(self) -> None:
        self._screen.stage(f"One label: {MODE_LABEL}=ambient on namespace {NAMESPACE}")
        seconds = self._lab.label_namespace(NAMESPACE, "ambient")
        self._report.evidence["enroll_seconds"] = round(seconds, 3)
        self._screen.note(f"all pods are in the mesh after {seconds * 1000:.0f} ms")
        self._claim("enrolled_within_a_second", "the label took less than a second", seconds < 1)

    def _after(self) -> None:
        self._screen.stage("After: the same request, the same programs")
        visit = self._visit(self._server)
        outbound = self._logs[CLIENT].wait_for(lambda entry: entry["direction"] == "outbound")
        inbound = self._logs[SERVER].wait_for(lambda entry: entry["direction"] == "inbound")
        direction, stream = visit.answer()
        self._screen.note(self._summary(visit))
        self._screen.bytes(f"on the link: {_name(direction)}", stream)
        if visit.own != visit.streams:
            self._screen.note(
                f"and what the agents asked the CA, {machine.CA_ADDRESS}:{CA_PORT}, over TLS too"
            )
        hello = wire.parse_server_hello(stream)
        self._claim("same_answer", "the client got the same answer", visit.body == self._plain.body)
        self._claim(
            "payload_unreadable_after",
            "after, nothing of the answer could be read on the link",
            not visit.shows(self._plain.line),
        )
        self._claim(
            "tls_1_3", "the server chose TLS 1.3", hello is not None and hello.version == "TLS 1.3"
        )
        self._claim(
            "only_tls_records",
            "the link carried TLS records and nothing else",
            all(map(wire.is_all_records, visit.streams.values())),
        )
        self._claim(
            "only_the_tunnel_port",
            "but for the CA's, the only port on the link was the tunnel's",
            visit.is_all_on(HBONE_PORT),
        )
        self._claim(
            "path_is_hbone",
            "both agents logged the path as HBONE",
            (outbound["path"], inbound["path"]) == ("hbone", "hbone"),
        )
        self._claim(
            "client_proved",
            "the client proved its identity",
            inbound["src.identity"] == _identity(self._client),
        )
        self._claim(
            "server_proved",
            "the server proved its identity",
            outbound["dst.identity"] == _identity(self._server),
        )
        self._claim(
            "client_sees_server_address",
            "the client sees the address that it asked for",
            visit.peer == self._plain.peer,
        )
        self._claim(
            "server_sees_client_address",
            "the server sees the client's own address",
            self._server_saw() == str(self._client.address4),
        )
        tls = f"{hello.version}, {hello.cipher_suite}" if hello else "none"
        facts = (
            ("path", outbound["path"], "the agents' access logs"),
            ("protocol", tls, "the ServerHello on the link"),
            ("client's identity", inbound["src.identity"], "its certificate, at the server"),
            ("server's identity", outbound["dst.identity"], "its certificate, at the client"),
            ("client as the server sees it", self._server_saw(), "the server's own log"),
            ("server as the client sees it", visit.peer, "getpeername() of curl"),
        )
        columns = ("fact", "seen", "where")
        self._screen.table(columns, [dict(zip(columns, fact, strict=True)) for fact in facts])
        self._report.evidence |= {
            "tls": tls,
            "link": [_name(way) for way in visit.streams],
            "connection": {"outbound": outbound, "inbound": inbound},
        }
        answer = self._late.communicate("\n", timeout=10)[0]
        self._claim(
            "open_connection_went_on",
            "a connection opened before the label went on",
            self._plain.body.decode() in answer,
        )
        self._screen.note("a connection that was open before the label has been answered as well")

    def _visit_the_neighbor(self) -> None:
        self._screen.stage(
            "Two pods of one node: the agent judges once, then the kernel joins them"
        )
        rows: list[Row] = []
        for request in ("first", "second"):
            visit = self._visit(self._neighbor)
            entry = self._logs[CLIENT].wait_for(
                lambda entry: (
                    entry["dst.original"] == f"{self._neighbor.address4}:{PORT}"
                    and entry["direction"] == "outbound"
                )
            )
            rows.append(
                {
                    "request": request,
                    "path": entry["path"],
                    "server's identity": entry["dst.identity"],
                    "milliseconds": f"{visit.milliseconds:.1f}",
                    "over the link": len(visit.own),
                }
            )
        self._screen.table(list(rows[0]), rows)
        self._report.evidence["neighbor"] = rows
        self._claim(
            "second_connection_is_direct",
            "the second connection to a neighbor took the direct path, logged like any other",
            [row["path"] for row in rows] == ["hbone", "direct"]
            and {row["server's identity"] for row in rows} == {_identity(self._neighbor)},
        )

    def _deny(self, stack: ExitStack) -> None:
        name = f"{POLICY['metadata']['namespace']}/{POLICY['metadata']['name']}"
        self._screen.stage(f"One policy: {POLICY['spec']['action']} {name}, and one less")
        log = self._lab.agent_log(self._neighbor.node)
        held = self._open(stack, IDLE_CONNECTION, self._neighbor)
        closings, verdicts = evidence.AccessLog(log), evidence.AccessLog(log)
        began = time.monotonic()
        self._lab.write_object(POLICY)
        held.communicate(timeout=10)
        seconds = time.monotonic() - began
        closing = closings.wait_for(lambda entry: entry["path"] == "direct")
        refused = self._curl(self._neighbor)
        verdict = verdicts.wait_for(lambda entry: entry.get("verdict") == "deny")
        self._screen.note(
            f"the open connection was closed after {seconds * 1000:.0f} ms; the next one: "
            f"{refused.stderr.decode().splitlines()[0]}"
        )
        changes = evidence.AccessLog(log)
        self._lab.remove_object(POLICY)
        changes.wait_for(lambda _entry: True, "policies in force")
        visit = self._visit(self._neighbor)
        self._screen.note(f"without the policy: {self._summary(visit)}")
        columns = ("connection", "path", "result", "policy")
        self._screen.table(
            columns,
            [
                dict(zip(columns, (what, *(entry.get(key) for key in columns[1:])), strict=True))
                for what, entry in (("open", closing), ("new", verdict))
            ],
        )
        self._report.evidence["policy"] = {"closed": closing, "denied": verdict}
        self._report.evidence["policy_seconds"] = round(seconds, 3)
        self._claim(
            "policy_closes_open_connections",
            "a policy closed an open connection of the direct path within a second",
            seconds < 1 and closing["result"] == "reset",
        )
        self._claim(
            "policy_denies",
            "the policy denied the next connection, and the access log names it",
            refused.returncode != 0 and not refused.stdout and name in str(verdict.get("policy")),
        )
        self._claim(
            "policy_taken_back_allows",
            "without the policy the client got its answer again",
            visit.body == self._plain.body,
        )

    def _look_into_the_kernel(self) -> None:
        self._screen.stage("In the kernel: maps instead of rules")
        directories = listing.find_directories((self._lab.pins,))
        names = ("ss_pods", "ss_listeners")
        for name in names:
            rows = [row for path in directories for row in listing.dump_map(path, name)]
            self._report.evidence[name] = rows
            self._screen.note(f"sidestep maps dump {name}")
            self._screen.table(listing.columns(name), rows)
        captured = {row["pod"] for row in self._report.evidence["ss_pods"]}
        self._claim(
            "maps_name_the_pods",
            "the maps hold the pods, read from the pins alone",
            captured == {CLIENT, SERVER, NEIGHBOR},
        )
        filters = evidence.read_filters(self._namespaces)
        for name, rules in filters.items():
            self._claim(
                f"{name}_unchanged",
                f"{name} is as it was, in every namespace",
                rules == self._filters[name],
            )
        self._screen.table(
            ("asked", "namespaces", "before", "now"),
            [
                {
                    "asked": ", ".join(" ".join(command) for command in commands),
                    "namespaces": len(self._namespaces),
                    "before": _lines(self._filters[name]),
                    "now": _lines(filters[name]),
                }
                for name, commands in evidence.FILTERS.items()
            ],
        )

    def _unenroll(self) -> None:
        self._screen.stage("One label less: the pods leave, and nobody notices")
        seconds = self._lab.label_namespace(NAMESPACE, None)
        visit = self._visit(self._server)
        self._screen.note(f"out of the mesh after {seconds * 1000:.0f} ms; {self._summary(visit)}")
        self._claim(
            "leaves_by_label",
            "without the label the pods talk as before",
            visit.shows(visit.line) and visit.body == self._plain.body,
        )
        self._claim(
            "nothing_restarted",
            "no process was restarted",
            evidence.process_starts(self._starts) == self._starts,
        )

    # -- parts --------------------------------------------------------------------------------

    def _visit(self, server: LabPod) -> Visit:
        """Let the client's curl fetch the document, and record the link meanwhile."""
        self._recorder.take()
        done = self._curl(server)
        if done.returncode != 0:
            raise LabError(f"curl in {CLIENT} failed: {done.stderr.decode().strip()}")
        host, port, _status, seconds = done.stderr.decode().split()
        streams = wire.join_streams(self._recorder.take())
        spoken = {direction: stream for direction, stream in streams.items() if stream}
        return Visit(done.stdout, f"{host}:{port}", float(seconds) * 1000, spoken)

    def _curl(self, server: LabPod) -> subprocess.CompletedProcess[bytes]:
        url = f"http://{server.address4}:{PORT}/{DOCUMENT}"
        command = ["curl", "-sSf", "-m", "5", "-w", CURL_REPORT, url]
        return subprocess.run(
            self._lab.command_in(self._client, command), capture_output=True, check=False
        )

    def _open(self, stack: ExitStack, script: str, server: LabPod) -> subprocess.Popen[str]:
        """Open a connection of the client now, by a shell that does the rest of `script` later."""
        command = ["bash", "-c", script.format(host=server.address4, port=PORT)]
        opened = subprocess.Popen(
            self._lab.command_in(self._client, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.enter_context(opened)
        stack.callback(opened.kill)
        assert opened.stdout is not None
        if opened.stdout.readline() != "open\n":
            raise LabError(f"a shell in {CLIENT} cannot connect to {server.key}")
        return opened

    def _server_saw(self) -> str:
        """Return the client of the last request in the server's own log."""
        lines = self._lab.pod_log(self._server).read_text().splitlines()
        requests = [line for line in lines if "GET" in line] or ["nobody"]
        return requests[-1].split()[0].removeprefix("::ffff:")

    def _summary(self, visit: Visit) -> str:
        return (
            f"curl in {CLIENT} got {len(visit.body)} bytes from {visit.peer} "
            f"in {visit.milliseconds:.1f} ms"
        )


def _name(direction: Direction) -> str:
    return " -> ".join(endpoint(str(host), port) for host, port in direction.ends)


def _lines(rules: dict[str, str]) -> str:
    count = sum(len(text.splitlines()) for text in rules.values())
    return f"{count} lines" if count else "empty"


def _identity(pod: LabPod) -> str:
    account = pod.body["spec"]["serviceAccountName"]
    return str(SpiffeId(TRUST_DOMAIN, pod.namespace, account))

"""Everything that takes bytes from outside, as functions of bytes, with good samples to begin from.

A target returns whatever the bytes mean. Only the errors that its caller expects may leave the code
under test; anything else leaves the target, and is a finding. tests/property/test_outside.py runs
each for a moment in CI, scripts/fuzz.py for as long as one likes; inputs that once failed are kept
in tests/property/kept/<target>/.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import hpack
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from agent import inheritance, web
from agent.admin import Admin
from agent.discovery.directory import read_objects
from agent.discovery.selector_pairs import parse_pairs
from agent.discovery.translate import SourcedObject, Translator
from agent.elders import parse_counts
from agent.errors import (
    ConfigError,
    HandoverFailed,
    ManifestError,
    RequestInvalid,
    RevocationInvalid,
    UntrustedPeer,
)
from agent.identity import custody, der, keys, revocation, wire
from agent.identity.verify import Part, verify_peer
from agent.loglines import Format, build_line, parse_levels
from agent.metrics import understood
from agent.model.identity import SpiffeId
from agent.model.pod import LocalPod
from agent.tally import Tally
from agent.tunnel import frames
from agent.tunnel.connection import Connection, Role
from agent.tunnel.events import ConnectRequested
from agent.tunnel.inbound import forwarded_host, parse_authority
from agent.tunnel.labels import read_service_name
from cni.conflist import PLUGIN_TYPE, Write, plan_install, plan_uninstall
from cni.protocol import MAGIC, SPEC_VERSION, CniError, Code, build_error, parse_request
from tests.support.certificates import Maker
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.identity.authority import Authority
    from cni.conflist import Change

KEPT = ROOT / "tests/property/kept"
IDENTITY = SpiffeId("cluster.local", "shop", "client")
OUTPUT_BYTES = 1 << 20  # more than any input of a fuzzer deserves as an answer


@dataclass(frozen=True)
class Target:
    """What takes bytes, and bytes that it likes."""

    run: Callable[[bytes], object]
    samples: Callable[[], list[bytes]]


def _feed(role: Role, data: bytes) -> None:
    """Give bytes to one end in two pieces; it answers with a bounded number of bytes."""
    connection = Connection(role)
    middle = len(data) // 2
    for part in (data[:middle], data[middle:]):
        for event in connection.receive(part):
            if isinstance(event, ConnectRequested) and not connection.is_terminated:
                connection.respond(event.stream_id, 503)
    assert len(connection.take_output()) <= OUTPUT_BYTES


def _http2_samples(preface: bytes) -> list[bytes]:
    encode = hpack.Encoder().encode
    request = encode([(":method", "CONNECT"), (":authority", "10.0.0.1:80"), ("baggage", "a=b")])
    head = frames.build_head(len(request), frames.FrameType.HEADERS, frames.END_HEADERS, 1)
    start = preface + frames.build_settings({})
    body = frames.build_head(5, frames.FrameType.DATA, 0, 1) + b"hello"
    rest = frames.build_ping(b"sidestep", is_ack=False) + frames.build_window_update(0, 5)
    return [
        start + head + request + body + frames.build_reset(1, 8),
        start + rest + frames.build_goaway(1, 0),
    ]


def http2_server(data: bytes) -> None:
    """What a peer that dialed 15008 may send, once TLS is done."""
    _feed(Role.SERVER, data)


def http2_client(data: bytes) -> None:
    """What a peer that we dialed may answer."""
    _feed(Role.CLIENT, data)


def header_block(data: bytes) -> None:
    """A header block (HPACK) in a well-formed frame."""
    head = frames.build_head(len(data), frames.FrameType.HEADERS, frames.END_HEADERS, 1)
    if len(data) <= frames.DEFAULT_FRAME_BYTES:
        _feed(Role.SERVER, frames.PREFACE + frames.build_settings({}) + head + data)


def request_headers(data: bytes) -> None:
    """The texts of a CONNECT that say where to and for whom."""
    text = data.decode("latin-1")
    with contextlib.suppress(ValueError):
        parse_authority(text)
    read_service_name(forwarded_host(text))
    for form in Format:
        entry = {"time": "t", "level": "info", "scope": "access", "message": text, "field": text}
        line = build_line(form, entry)
        assert len(line.splitlines()) == 1, line


def certificate(data: bytes) -> None:
    """A peer's certificate, which OpenSSL has let through."""
    now = datetime.now(UTC).timestamp()
    with contextlib.suppress(UntrustedPeer):
        verify_peer(data, Part.CLIENT, frozenset(), now)
    with contextlib.suppress(ValueError):
        for found in der.decode_pem(data):
            der.read_certificate(found)


@functools.cache
def _authority() -> Authority:
    with tempfile.TemporaryDirectory() as directory:
        return custody.open_authority(custody.DirectoryStore(Path(directory)), "cluster.local")


def signing_request(data: bytes) -> None:
    """A CSR as an agent sends it to the CA; what is signed is for the identity that was checked."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(RequestInvalid):
        leaf, *_rest = _authority().sign_request(text, IDENTITY, timedelta(hours=1))
        found = x509.load_pem_x509_certificate(leaf.encode())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [name.value for name in names] == [str(IDENTITY)]


def ca_message(data: bytes) -> None:
    """A request to the CA, and an answer of it, in protobuf's wire format."""
    for parse in (wire.parse_request, wire.parse_response):
        with contextlib.suppress(ValueError):
            parse(data)


@functools.cache
def _maker() -> Maker:
    return Maker()


def revocations(data: bytes) -> None:
    """The file of revoked certificates."""
    with contextlib.suppress(RevocationInvalid):
        revocation.parse_revocations(data, [_maker().root.certificate])


def manifest(data: bytes) -> None:
    """A file of objects, which people write."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(data)
        try:
            objects = read_objects(Path(file.name))
        except ManifestError:
            return
    translator = Translator()
    for found in objects:
        translator.put(found)
    translator.snapshot()


def api_object(data: bytes) -> None:
    """An object as an API server sends it."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(body, dict):
        translator = Translator()
        translator.put(SourcedObject("api", body))
        translator.snapshot()


def cni_request(data: bytes) -> None:
    """What the plugin passes on of its environment and its input; an answer is always possible."""
    version, name = SPEC_VERSION, ""
    with contextlib.suppress(CniError):
        request = parse_request(data)
        version, name = request.cni_version, request.name
    answer = build_error(CniError(Code.NOT_CAPTURED, name), version)
    assert json.loads(answer.removeprefix(b"1\n"))["cniVersion"] == version


ENTRY = {"type": PLUGIN_TYPE, "agentSocket": "/run/sidestep/cni.sock"}


def network_files(data: bytes) -> None:
    """The network configurations of a node, which are others'; each gets back what it was."""
    for name in ("10-pods.conflist", "10-pods.conf"):
        files = {name: data, "20-next.json": data}
        if plan_uninstall(files):
            continue  # our entry is in there already
        installed = dict(files)
        _change(installed, plan_install(files, ENTRY))
        assert plan_install(installed, ENTRY) == []
        _change(installed, plan_uninstall(installed))
        assert installed == files


def _change(files: dict[str, bytes], changes: list[Change]) -> None:
    for change in changes:
        if isinstance(change, Write):
            files[change.name] = change.content
        else:
            del files[change.name]


def handover(data: bytes) -> None:
    """What an agent of another version says of a pod and of what it has counted."""
    with contextlib.suppress(HandoverFailed):
        found = inheritance.decode(data)
        assert inheritance.decode(inheritance.encode(found)) == found
    tally = Tally()
    tally.add(understood(parse_counts(data)), 0.0)


def admin_socket(data: bytes) -> None:
    """What a client may write to the agent's socket; the next one is answered as ever."""

    async def run() -> None:
        failures: list[dict[str, object]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: failures.append(context))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "agent.sock"

            async def echo(arguments: dict[str, object]) -> object:
                return arguments

            async def page(query: web.Query) -> web.Response:
                return web.text(json.dumps(query))

            admin = Admin(path, lambda: {"ready": True}, {"echo": echo}, {("GET", "/p"): page})
            await admin.start()
            try:
                await asyncio.to_thread(_exchange, path, data)
                answer = await asyncio.to_thread(_exchange, path, b'{"command": "state"}\n')
                assert json.loads(answer) == {"ready": True}
            finally:
                admin.stop()
        assert failures == []

    asyncio.run(run())


def _exchange(path: Path, sent: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            # A watcher is answered for as long as it likes: one line is enough.
            with connection.makefile("rb") as lines:
                return lines.readline()
    return b""


def http_request(data: bytes) -> None:
    """What may be written to the metrics or admin port."""

    async def page(query: web.Query) -> web.Response:
        return web.text(json.dumps(query))

    answer = asyncio.run(web.answer(data, {("GET", "/p"): page, ("POST", "/p"): page}))
    head, separator, body = answer.partition(web.END_OF_HEAD)
    assert separator
    assert head.startswith(b"HTTP/1.1 ")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")


def options(data: bytes) -> None:
    """Options and parameters with a grammar of their own."""
    text = data.decode("utf-8", "replace")
    for parse in (parse_levels, parse_pairs):
        with contextlib.suppress(ConfigError):
            parse(text)
    with contextlib.suppress(ConfigError):
        levels = parse_levels(text)
        assert parse_levels(str(levels)) == levels


def _revocation_samples() -> list[bytes]:
    root, now = _maker().root, datetime.now(UTC)
    revoked = x509.RevokedCertificateBuilder().serial_number(7).revocation_date(now).build()
    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(now)
        .next_update(now + timedelta(days=1))
        .add_revoked_certificate(revoked)
        .sign(root.key, hashes.SHA256())
    )
    encodings = (serialization.Encoding.DER, serialization.Encoding.PEM)
    return [made.public_bytes(encoding) for encoding in encodings]


def _certificate_samples() -> list[bytes]:
    made = _maker().leaf()
    return [made.certificate.public_bytes(serialization.Encoding.DER), made.pem]


def _files(*patterns: str) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "a",
        "namespace": "shop",
        "uid": "u",
        "labels": {"app": "a", "istio.io/dataplane-mode": "ambient"},
        "annotations": {"ambient.istio.io/redirection": "enabled"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": "a-1", "controller": True}],
    },
    "spec": {"nodeName": "n", "serviceAccountName": "a"},
    "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
}
POLICY = {
    "apiVersion": "security.istio.io/v1",
    "kind": "AuthorizationPolicy",
    "metadata": {"name": "p", "namespace": "shop"},
    "spec": {
        "action": "DENY",
        "selector": {"matchLabels": {"app": "a"}},
        "rules": [
            {
                "from": [{"source": {"principals": ["*"], "notIpBlocks": ["10.0.0.0/8"]}}],
                "to": [{"operation": {"ports": ["80"]}}],
                "when": [{"key": "destination.port", "values": ["80"]}],
            }
        ],
    },
}
CNI_ENVIRONMENT = MAGIC + b"\0".join(
    (
        b"CNI_COMMAND=ADD",
        b"CNI_CONTAINERID=c1",
        b"CNI_NETNS=/run/netns/n",
        b"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=a;K8S_POD_UID=u\0",
        b"",
    )
)
NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "type": "ptp",
    "prevResult": {
        "interfaces": [{"name": "eth0", "sandbox": "/run/netns/n"}],
        "ips": [{"address": "10.0.0.1/24", "interface": 0}],
    },
}
TARGETS = {
    "http2_server": Target(http2_server, lambda: _http2_samples(frames.PREFACE)),
    "http2_client": Target(http2_client, lambda: _http2_samples(b"")),
    "header_block": Target(
        header_block,
        lambda: [hpack.Encoder().encode([(":method", "CONNECT"), (":authority", "a:1")])],
    ),
    "request_headers": Target(
        request_headers,
        lambda: [b"10.0.0.1:80", b"[fd00::1]:80", b'for="10.0.0.1:4";host=a.b.svc.cluster.local'],
    ),
    "certificate": Target(certificate, _certificate_samples),
    "signing_request": Target(signing_request, lambda: [keys.build_csr(keys.generate(), IDENTITY)]),
    "ca_message": Target(
        ca_message,
        lambda: [
            wire.build_request(wire.Request("csr", 3600, str(IDENTITY))),
            wire.build_response(["leaf", "root"]),
        ],
    ),
    "revocations": Target(revocations, _revocation_samples),
    "manifest": Target(manifest, lambda: _files("deploy/lab/*.yaml")),
    "api_object": Target(
        api_object, lambda: [json.dumps(POD).encode(), json.dumps(POLICY).encode()]
    ),
    "cni_request": Target(cni_request, lambda: [CNI_ENVIRONMENT + json.dumps(NETWORK).encode()]),
    "network_files": Target(
        network_files,
        lambda: [
            json.dumps(NETWORK).encode(),
            b'{"name": "n",\n "plugins" : [ {"type": "ptp"} ,{"type":"x"} ]}\n',
        ],
    ),
    "handover": Target(
        handover,
        lambda: [
            inheritance.encode(
                inheritance.Inheritance(LocalPod("u", "shop", "a", "a", ()), 7, (15008,))
            ),
            b'{"counts": [["connections_denied", [["policy", "p"]], 3]]}',
        ],
    ),
    "admin_socket": Target(
        admin_socket,
        lambda: [
            b'{"command": "echo", "arguments": {"a": 1}}\n',
            b"GET /p?a=b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ],
    ),
    "http_request": Target(
        http_request, lambda: [b"GET /p?a=b HTTP/1.1\r\nHost: 127.0.0.1:15000\r\n\r\n"]
    ),
    "options": Target(
        options,
        lambda: [
            b"info,access=debug",
            b"- podSelector: {matchLabels: {a: b}}\n  namespaceSelector: {matchLabels: {c: d}}",
        ],
    ),
}

"""The CA as a process: whom it signs for, whom it refuses, and how fast."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from agent.errors import AuthorityRefused, AuthorityUnavailable, ClocksDiffer
from agent.identity import files, keys, wire
from agent.identity.client import AuthorityClient
from agent.identity.rotation import MOST_IN_FLIGHT
from agent.model.identity import SpiffeId
from tests.support.ca_process import HOST, NODE_TOKENS, CaProcess
from tests.support.certificates import PEM
from tests.support.clock import Clock, build_shim
from tests.support.processes import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CLIENT = SpiffeId("cluster.local", "shop", "client")
SERVER = SpiffeId("cluster.local", "shop", "server")


@pytest.fixture
def ca(tmp_path: Path) -> Iterator[CaProcess]:
    made = CaProcess(tmp_path)
    made.add_pod("east", "shop", "client")
    made.add_pod("west", "shop", "server", 2)
    made.start()
    yield made
    made.kill()


def client_for(ca: CaProcess, node: str = "east", lifetime_seconds: int = 3600) -> AuthorityClient:
    token = ca.directory / f"token-{node}"
    token.write_text(NODE_TOKENS.get(node, node))
    return AuthorityClient(ca.address, HOST, token, ca.roots, lifetime_seconds)


async def ask(client: AuthorityClient, identity: SpiffeId) -> Any:
    try:
        return await client.issue(identity)
    finally:
        await client.close()


def test_certificate_is_for_the_identity_and_the_time_that_were_asked_for(ca: CaProcess) -> None:
    issued = asyncio.run(ask(client_for(ca), CLIENT))
    leaf = x509.load_pem_x509_certificates(issued.chain)[0]
    assert leaf.subject == x509.Name([])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(str(CLIENT))]
    assert abs(issued.expires - time.time() - 3600) < 30
    assert issued.roots == ca.roots.read_bytes()
    key = keys.parse_pem(issued.key, "the issued key")
    assert key.curve.name == "secp256r1"
    (line,) = ca.entries("certificate signed")
    assert (line["node"], line["identity"]) == ("east", str(CLIENT))
    assert line["serial"] == f"{leaf.serial_number:x}"


@pytest.mark.parametrize(
    ("node", "identity", "code", "reason"),
    [
        ("east", SERVER, "PERMISSION_DENIED", "identity_denied"),
        ("west", CLIENT, "PERMISSION_DENIED", "identity_denied"),
        ("east", SpiffeId("cluster.local", "other", "client"), "PERMISSION_DENIED",
         "identity_denied"),
        ("east", SpiffeId("cluster.example", "shop", "client"), "PERMISSION_DENIED",
         "identity_denied"),
        ("a-token-that-nobody-has", CLIENT, "UNAUTHENTICATED", "caller_unknown"),
        ("", CLIENT, "UNAUTHENTICATED", "caller_unknown"),
    ],
)  # fmt: skip
def test_what_is_not_the_callers_is_refused_and_audited(
    ca: CaProcess, node: str, identity: SpiffeId, code: str, reason: str
) -> None:
    with pytest.raises(AuthorityRefused, match=f"{code}: {reason}: "):
        asyncio.run(ask(client_for(ca, node), identity))
    (line,) = ca.entries("certificate refused")
    assert line["reason"] == reason
    if reason == "identity_denied":
        assert (line["node"], line["identity"]) == (node, str(identity))
    assert ca.entries("certificate signed") == []


def call(ca: CaProcess, message: bytes, token: str = NODE_TOKENS["east"]) -> grpc.StatusCode:
    """Send bytes as they are; returns the status."""
    credentials = grpc.ssl_channel_credentials(ca.roots.read_bytes())
    options = [("grpc.ssl_target_name_override", HOST)]
    with grpc.secure_channel(ca.address, credentials, options) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(wire.METHOD)
        try:
            method(message, timeout=10, metadata=(("authorization", f"Bearer {token}"),))
        except grpc.RpcError as error:
            found: grpc.StatusCode = error.code()
            return found
    return grpc.StatusCode.OK


def csr(key: Any, *names: x509.GeneralName) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM).decode()


NAME = x509.UniformResourceIdentifier(str(CLIENT))
OTHER = x509.UniformResourceIdentifier(str(SERVER))


def forged() -> str:
    """A request whose signature is of another key."""
    text = csr(keys.generate(), NAME)
    body = x509.load_pem_x509_csr(text.encode()).public_bytes
    from cryptography.hazmat.primitives.serialization import Encoding

    data = bytearray(body(Encoding.DER))
    data[-1] ^= 1
    return x509.load_der_x509_csr(bytes(data)).public_bytes(PEM).decode()


@pytest.mark.parametrize(
    "make",
    [
        lambda: wire.Request("", 60, str(CLIENT)),
        lambda: wire.Request("not a request", 60, str(CLIENT)),
        lambda: wire.Request(csr(keys.generate()), 60, str(CLIENT)),
        lambda: wire.Request(csr(keys.generate(), OTHER), 60, str(CLIENT)),
        lambda: wire.Request(csr(keys.generate(), NAME, OTHER), 60, str(CLIENT)),
        lambda: wire.Request(csr(keys.generate(), NAME, x509.DNSName("a")), 60, str(CLIENT)),
        lambda: wire.Request(csr(rsa.generate_private_key(65537, 2048), NAME), 60, str(CLIENT)),
        lambda: wire.Request(forged(), 60, str(CLIENT)),
        lambda: wire.Request(csr(keys.generate(), NAME), 60, ""),
        lambda: wire.Request(csr(keys.generate(), NAME), 60, "client"),
    ],
    ids=["no-csr", "no-pem", "no-name", "other-name", "two-names", "dns-name", "rsa", "forged",
         "no-identity", "no-spiffe-id"],
)  # fmt: skip
def test_a_wrong_request_is_an_invalid_argument(
    ca: CaProcess, make: Callable[[], wire.Request]
) -> None:
    assert call(ca, wire.build_request(make())) is grpc.StatusCode.INVALID_ARGUMENT
    (line,) = ca.entries("certificate refused")
    assert line["reason"] == "request_invalid"


def test_bytes_that_are_no_message_are_an_invalid_argument(ca: CaProcess) -> None:
    assert call(ca, b"\xff" * 50) is grpc.StatusCode.INVALID_ARGUMENT
    good = wire.build_request(wire.Request(csr(keys.generate(), NAME), 60, str(CLIENT)))
    assert call(ca, good) is grpc.StatusCode.OK


@pytest.mark.parametrize(("asked", "given"), [(10, 10), (10**9, 86400), (0, 86400), (-5, 86400)])
def test_validity_is_what_is_asked_for_within_limits(ca: CaProcess, asked: int, given: int) -> None:
    issued = asyncio.run(ask(client_for(ca, lifetime_seconds=asked), CLIENT))
    assert abs(issued.expires - time.time() - given) < 30


def test_a_pod_that_comes_a_moment_later_is_waited_for(ca: CaProcess) -> None:
    late = SpiffeId("cluster.local", "shop", "late")

    async def race() -> Any:
        client = client_for(ca)
        asking = asyncio.ensure_future(ask(client, late))  # noqa: TID251  # a test's own task
        await asyncio.to_thread(ca.add_pod, "east", "shop", "late", 3)
        return await asking

    assert asyncio.run(race()).identity == late


def test_a_caller_who_asks_for_what_is_not_his_holds_up_nobody(ca: CaProcess) -> None:
    async def flood() -> tuple[float, list[BaseException | Any]]:
        greedy, modest = client_for(ca), client_for(ca, "west")
        asked = [
            asyncio.ensure_future(greedy.issue(SpiffeId("cluster.local", "shop", f"no-{number}")))  # noqa: TID251  # a test's own tasks
            for number in range(80)
        ]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        began = time.monotonic()
        await modest.issue(SERVER)
        seconds = time.monotonic() - began
        refused = await asyncio.gather(*asked, return_exceptions=True)
        for client in (greedy, modest):
            await client.close()
        return seconds, refused

    seconds, refused = asyncio.run(flood())
    assert seconds < 1  # while the first eight still wait for their pods
    assert all(isinstance(error, (AuthorityRefused, AuthorityUnavailable)) for error in refused)


def test_a_client_that_trusts_another_root_does_not_talk_to_it(
    ca: CaProcess, tmp_path: Path
) -> None:
    from tests.support.certificates import Maker

    other = tmp_path / "other.pem"
    other.write_bytes(Maker().root.pem)
    token = tmp_path / "token"
    token.write_text(NODE_TOKENS["east"])
    for roots, name in ((other, HOST), (ca.roots, "other.test")):
        client = AuthorityClient(ca.address, name, token, roots, 60)
        with pytest.raises(AuthorityUnavailable, match="UNAVAILABLE"):
            asyncio.run(ask(client, CLIENT))
    assert ca.entries("certificate signed") == []


def test_the_token_is_read_again_for_each_call(ca: CaProcess) -> None:
    async def change() -> None:
        client = client_for(ca, "nobody-knows-this-one")
        with pytest.raises(AuthorityRefused):
            await client.issue(CLIENT)
        (ca.directory / "token-nobody-knows-this-one").write_text(NODE_TOKENS["east"])
        assert (await client.issue(CLIENT)).identity == CLIENT
        await client.close()

    asyncio.run(change())


def test_new_tokens_count_without_a_restart(ca: CaProcess) -> None:
    client = client_for(ca, "new-token-of-east-0")
    ca.tokens.write_text("new-token-of-east-0 east\n")
    assert asyncio.run(ask(client, CLIENT)).identity == CLIENT


@pytest.mark.parametrize(
    ("name", "mode"), [("ca/ca-key.pem", 0o644), ("ca/ca-key.pem", 0o640), ("tokens", 0o644)]
)
def test_ca_refuses_to_start_with_a_readable_key(ca: CaProcess, name: str, mode: int) -> None:
    assert ca.stop() == 0
    (ca.directory / name).chmod(mode)
    done = subprocess.run(ca.command(), capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert f"{ca.directory / name} has mode {mode:04o}" in done.stderr
    assert "PRIVATE KEY" not in done.stdout + done.stderr


def test_root_is_rotated_by_command_while_the_ca_runs(ca: CaProcess) -> None:
    def rotate(stage: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "agent.cli", "ca", "rotate-root", "--stage", stage,
                   "--directory", str(ca.keep), *options]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    async def run() -> list[tuple[int, bytes]]:
        client = client_for(ca)  # one channel through all of it
        found: list[tuple[int, bytes]] = []
        for stage in ("", "trust", "sign", "finish"):
            if stage:
                done = await asyncio.to_thread(rotate, stage, "--now")
                assert done.returncode == 0, done.stderr
                await wait_for_change(ca, len(found))
            issued = await client.issue(CLIENT)
            roots = x509.load_pem_x509_certificates(issued.roots)
            found.append((len(roots), issued.chain))
        await client.close()
        return found

    before = x509.load_pem_x509_certificate(ca.roots.read_bytes())
    found = asyncio.run(run())
    after = x509.load_pem_x509_certificate(ca.roots.read_bytes())
    assert [count for count, _chain in found] == [1, 2, 2, 1]
    signers = []
    for _count, chain in found:
        leaf = x509.load_pem_x509_certificate(chain)
        signers.append(before if leaf.issuer == before.subject else after)
        leaf.verify_directly_issued_by(signers[-1])
    assert signers == [before, before, after, after]
    early = rotate("trust")
    assert early.returncode == 0
    early = rotate("sign")
    assert early.returncode == 2
    assert "connections would fail" in early.stderr


async def wait_for_change(ca: CaProcess, count: int) -> None:
    """Wait until the CA has said `count` times that its key or roots changed."""
    async with asyncio.timeout(10):
        async for _ in files.changes([ca.log.parent], asyncio.Event()):
            if len(ca.entries("CA's key or roots changed")) >= count:
                return


def test_ca_that_is_away_is_unavailable_and_back_without_a_new_client(ca: CaProcess) -> None:
    async def run() -> None:
        client = client_for(ca)
        await client.issue(CLIENT)
        ca.kill()
        with pytest.raises(AuthorityUnavailable, match="UNAVAILABLE"):
            await client.issue(CLIENT)
        await asyncio.to_thread(ca.start)
        deadline = time.monotonic() + 5
        while True:
            try:
                await client.issue(CLIENT)
                break
            except AuthorityUnavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
        await client.close()

    asyncio.run(run())


def test_five_hundred_identities_at_over_three_hundred_a_second(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """With the CA on one core; the test's own keys and checks are on the other."""
    ca = CaProcess(tmp_path)
    names = [f"account-{number}" for number in range(500)]
    for number, name in enumerate(names):
        ca.add_pod("east", "shop", name, number)
    ca.start()
    assert ca.process is not None
    os.sched_setaffinity(ca.process.pid, {0})
    try:
        seconds, cpu, issued = asyncio.run(issue_all(ca, names))
    finally:
        ca.kill()
    measured(
        f"CA on one core: {len(issued) / seconds:.0f} certificates a second with keys made here,"
        f" {len(issued) / cpu:.0f} a second of its CPU time"
    )
    assert {found.identity.service_account for found in issued} == set(names)
    serials = {x509.load_pem_x509_certificate(found.chain).serial_number for found in issued}
    assert len(serials) == 500
    # The CA's own time, so that a busy machine is no failure.
    assert 500 / cpu > 300


async def issue_all(ca: CaProcess, names: list[str]) -> tuple[float, float, list[Any]]:
    client = client_for(ca)
    await client.issue(SpiffeId("cluster.local", "shop", names[0]))  # the channel stands
    gate = asyncio.Semaphore(MOST_IN_FLIGHT)

    async def one(name: str) -> Any:
        async with gate:
            return await client.issue(SpiffeId("cluster.local", "shop", name))

    assert ca.process is not None
    cpu, began = cpu_seconds(ca.process.pid), time.monotonic()
    issued = await asyncio.gather(*(one(name) for name in names))
    seconds = time.monotonic() - began
    cpu = cpu_seconds(ca.process.pid) - cpu
    await client.close()
    return seconds, cpu, issued


def test_what_a_ca_with_another_clock_signs_is_not_used_until_its_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(build_shim(tmp_path), tmp_path / "offset")
    clock.set_ahead(-23 * 3600)  # its own certificate, which is for a day, is still valid here
    ca = CaProcess(tmp_path)
    ca.add_pod("east", "shop", "client")
    with monkeypatch.context() as patch:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        ca.start()
    try:
        with pytest.raises(ClocksDiffer, match="compare the clock"):
            asyncio.run(ask(client_for(ca), CLIENT))
        clock.set_ahead(0)
        assert asyncio.run(ask(client_for(ca), CLIENT)).expires > time.time()
    finally:
        ca.kill()

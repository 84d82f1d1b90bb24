"""Every wrong certificate, shown in a real TLS handshake to a server and to a client."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from agent import errors
from agent.identity import revocation, verify
from agent.identity.verify import Part
from agent.model.identity import SpiffeId
from agent.tunnel import tls
from agent.tunnel.messages import PutCertificate
from tests.support.certificates import SPIFFE, Made, Maker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXPECTED = SpiffeId("cluster.local", "shop", "client")
DER = serialization.Encoding.DER
HOUR = timedelta(hours=1)


def now() -> datetime:
    return datetime.now(UTC)


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


@dataclass
class Shown:
    """What the peer shows: its certificate, and what is between that and the root."""

    leaf: Made
    between: Sequence[Made] = field(default_factory=tuple)


def context(shown: Shown, roots: bytes, *, is_server: bool) -> ssl.SSLContext:
    chain = b"".join(made.pem for made in (shown.leaf, *shown.between))
    return tls.build_context(
        PutCertificate("", chain, shown.leaf.key_pem, roots), is_server=is_server
    )


def shake_hands(
    client: ssl.SSLContext, server: ssl.SSLContext
) -> tuple[ssl.SSLObject, ssl.SSLObject, dict[str, ssl.SSLError]]:
    """Shake hands in memory; returns both ends and how each failed."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        "client": client.wrap_bio(to_client, to_server),
        "server": server.wrap_bio(to_server, to_client, server_side=True),
    }
    failures: dict[str, ssl.SSLError] = {}
    done: set[str] = set()
    for _ in range(10):
        for name, end in ends.items():
            if name not in failures:
                try:
                    if name in done:
                        end.read(1)  # where a server's refusal arrives in TLS 1.3
                    else:
                        end.do_handshake()
                        done.add(name)
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLError as error:
                    failures[name] = error
    return ends["client"], ends["server"], failures


def judge(shown: Shown | None, part: Part, roots: bytes, revoked: frozenset[bytes]) -> str:
    """Show certificates to the other end as a worker does; returns the reason, empty if let in."""
    good = Maker()
    both = roots + good.root.pem
    ours = Shown(good.leaf([uri("spiffe://cluster.local/ns/shop/sa/other")]))
    if shown is None:
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        theirs.check_hostname = False
        theirs.verify_mode = ssl.CERT_NONE
    else:
        theirs = context(shown, both, is_server=part is Part.SERVER)
    mine = context(ours, both, is_server=part is Part.CLIENT)
    client, server = (theirs, mine) if part is Part.CLIENT else (mine, theirs)
    ends = shake_hands(client, server)
    judge_name = "server" if part is Part.CLIENT else "client"
    failure = ends[2].get(judge_name)
    if isinstance(failure, ssl.SSLCertVerificationError):
        return verify.explain(failure.verify_code, failure.verify_message).reason
    if failure is not None:
        assert failure.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
        return errors.PeerCertificateMissing.reason
    end = ends[1] if part is Part.CLIENT else ends[0]
    try:
        peer = verify.verify_peer(end.getpeercert(True), part, revoked, time.time())
        if part is Part.CLIENT:
            verify.require_trust_domain(peer, {"cluster.local", "alias.local"})
        else:
            verify.require_identity(peer, EXPECTED)
    except errors.UntrustedPeer as error:
        return error.reason
    assert peer.serial == shown.leaf.certificate.serial_number if shown else False
    return ""


def below_an_intermediate(maker: Maker) -> Shown:
    between = maker.intermediate("between")
    return Shown(maker.leaf(by=between), (between,))


def below_a_leaf(maker: Maker) -> Shown:
    """Signed by the key of a workload, which is no CA."""
    workload = maker.leaf(
        subject=x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "workload")])
    )
    return Shown(maker.leaf(by=workload), (workload,))


RIGHT: dict[str, Callable[[Maker], Shown]] = {
    "of the root": lambda maker: Shown(maker.leaf()),
    "below an intermediate": below_an_intermediate,
    "with a DNS name before the URI": lambda maker: Shown(
        maker.leaf([x509.DNSName("client.shop.svc"), SPIFFE])
    ),
    "with names of every kind after the URI": lambda maker: Shown(
        maker.leaf(
            [
                SPIFFE,
                x509.DNSName("client.shop.svc"),
                x509.IPAddress(ip_address("10.0.0.1")),
                x509.RFC822Name("client@shop.example"),
            ]
        )
    ),
    "without extended key usage": lambda maker: Shown(maker.leaf(purposes=None)),
}
WRONG: dict[str, tuple[Callable[[Maker], Shown], str]] = {
    "another CA": (lambda _maker: Shown(Maker().leaf()), "peer_authority_unknown"),
    "another CA with our root's name": (
        lambda maker: Shown(Maker(maker.root.certificate.subject).leaf()),
        "peer_authority_unknown",
    ),
    "signed by a workload": (below_a_leaf, "peer_authority_unknown"),
    "an intermediate that is not shown": (
        lambda maker: Shown(maker.leaf(by=maker.intermediate("hidden"))),
        "peer_authority_unknown",
    ),
    "expired": (
        lambda maker: Shown(maker.leaf(not_before=now() - 2 * HOUR, not_after=now() - HOUR)),
        "peer_expired",
    ),
    "not yet valid": (
        lambda maker: Shown(maker.leaf(not_before=now() + HOUR, not_after=now() + 2 * HOUR)),
        "peer_not_yet_valid",
    ),
    "two URIs": (
        lambda maker: Shown(maker.leaf([SPIFFE, uri("spiffe://cluster.local/ns/a/sa/b")])),
        "peer_names_wrong",
    ),
    "the same URI twice": (lambda maker: Shown(maker.leaf([SPIFFE, SPIFFE])), "peer_names_wrong"),
    "a DNS name only": (
        lambda maker: Shown(maker.leaf([x509.DNSName("client.shop.svc")])),
        "peer_names_wrong",
    ),
    "a DNS name beside two URIs": (
        lambda maker: Shown(
            maker.leaf([SPIFFE, uri("spiffe://cluster.local/ns/a/sa/b"), x509.DNSName("a.example")])
        ),
        "peer_names_wrong",
    ),
    "an id as a DNS name": (
        lambda maker: Shown(maker.leaf([x509.DNSName(SPIFFE.value)])),
        "peer_names_wrong",
    ),
    "no name": (lambda maker: Shown(maker.leaf(())), "peer_names_wrong"),
    "an id of another form": (
        lambda maker: Shown(maker.leaf([uri("spiffe://cluster.local/client")])),
        "peer_names_wrong",
    ),
    "another scheme": (
        lambda maker: Shown(maker.leaf([uri("https://cluster.local/ns/shop/sa/client")])),
        "peer_names_wrong",
    ),
    "a CA's certificate as leaf": (
        lambda maker: Shown(maker.leaf(is_authority=True)),
        "peer_is_authority",
    ),
    "the root itself": (lambda maker: Shown(maker.root), "peer_usage_wrong"),
    "a key that may not sign": (
        lambda maker: Shown(maker.leaf(signs_data=False)),
        "peer_usage_wrong",
    ),
    "a certificate for any purpose": (
        lambda maker: Shown(maker.leaf(purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])),
        "peer_usage_wrong",
    ),
    "a certificate for code": (
        lambda maker: Shown(maker.leaf(purposes=[ExtendedKeyUsageOID.CODE_SIGNING])),
        "peer_usage_wrong",
    ),
}


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("name", RIGHT)
def test_right_certificate_is_let_in(name: str, part: Part) -> None:
    maker = Maker()
    assert judge(RIGHT[name](maker), part, maker.root.pem, frozenset()) == ""


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_certificate_is_refused_with_its_reason(name: str, part: Part) -> None:
    maker = Maker()
    make, reason = WRONG[name]
    assert judge(make(maker), part, maker.root.pem, frozenset()) == reason


@pytest.mark.parametrize(
    ("trust_domain", "as_client", "as_server"),
    [
        ("cluster.local", "", ""),
        ("alias.local", "", "peer_unexpected"),
        ("cluster.example", "peer_trust_domain", "peer_unexpected"),
        ("cluster.local.example", "peer_trust_domain", "peer_unexpected"),
    ],
)
def test_trust_domain_decides_at_the_server(
    trust_domain: str, as_client: str, as_server: str
) -> None:
    maker = Maker()
    shown = Shown(maker.leaf([uri(f"spiffe://{trust_domain}/ns/shop/sa/client")]))
    assert judge(shown, Part.CLIENT, maker.root.pem, frozenset()) == as_client
    assert judge(shown, Part.SERVER, maker.root.pem, frozenset()) == as_server


@pytest.mark.parametrize(
    "path", ["ns/shop/sa/other", "ns/other/sa/client", "ns/shop/sa/client2", "ns/sho/sa/client"]
)
def test_client_refuses_any_other_identity_than_the_workloads(path: str) -> None:
    maker = Maker()
    shown = Shown(maker.leaf([uri(f"spiffe://cluster.local/{path}")]))
    assert judge(shown, Part.SERVER, maker.root.pem, frozenset()) == "peer_unexpected"
    assert judge(shown, Part.CLIENT, maker.root.pem, frozenset()) == ""


def test_certificate_for_clients_is_none_for_a_server_and_the_other_way_round() -> None:
    maker = Maker()
    for purpose, fits, other in (
        (ExtendedKeyUsageOID.CLIENT_AUTH, Part.CLIENT, Part.SERVER),
        (ExtendedKeyUsageOID.SERVER_AUTH, Part.SERVER, Part.CLIENT),
    ):
        shown = Shown(maker.leaf(purposes=[purpose]))
        assert judge(shown, fits, maker.root.pem, frozenset()) == ""
        assert judge(shown, other, maker.root.pem, frozenset()) == "peer_usage_wrong"


def test_peer_without_a_certificate_is_refused() -> None:
    assert judge(None, Part.CLIENT, Maker().root.pem, frozenset()) == "peer_certificate_missing"


@pytest.mark.parametrize("part", list(Part))
def test_revoked_certificate_is_refused_and_its_neighbour_is_not(part: Part) -> None:
    maker = Maker()
    shown, neighbour = below_an_intermediate(maker), below_an_intermediate(maker)
    issuer = shown.between[0]
    listed = revocation.parse_revocations(
        maker.crl(shown.leaf, by=issuer), [issuer.certificate, maker.root.certificate]
    )
    assert judge(shown, part, maker.root.pem, listed) == "peer_revoked"
    assert judge(neighbour, part, maker.root.pem, listed) == ""


@pytest.mark.parametrize(
    ("reason", "shown", "moment"),
    [
        ("peer_expired", Maker().leaf(), time.time() + 7200),
        ("peer_not_yet_valid", Maker().leaf(), time.time() - 7200),
    ],
)
def test_validity_is_checked_without_openssl_as_well(
    reason: str, shown: Made, moment: float
) -> None:
    with pytest.raises(errors.UntrustedPeer) as caught:
        verify.verify_peer(shown.certificate.public_bytes(DER), Part.CLIENT, frozenset(), moment)
    assert caught.value.reason == reason


BY_SIGNATURE = {name for name, (_make, reason) in WRONG.items() if reason.endswith("unknown")}


@pytest.mark.parametrize("name", WRONG.keys() - BY_SIGNATURE - {"the root itself"})
def test_all_but_signatures_is_checked_without_openssl_as_well(name: str) -> None:
    make, reason = WRONG[name]
    certificate = make(Maker()).leaf.certificate.public_bytes(DER)
    with pytest.raises(errors.UntrustedPeer) as caught:
        verify.verify_peer(certificate, Part.CLIENT, frozenset(), time.time())
    assert caught.value.reason == reason


def test_no_certificate_is_refused_without_openssl_as_well() -> None:
    with pytest.raises(errors.PeerCertificateMissing):
        verify.verify_peer(None, Part.CLIENT, frozenset(), 0)


def test_bytes_that_are_no_certificate_are_refused() -> None:
    with pytest.raises(errors.UntrustedPeer):
        verify.verify_peer(b"\x30\x03\x02\x01\x01", Part.CLIENT, frozenset(), 0)


def test_every_kind_of_refusal_has_a_case() -> None:
    covered = {reason for _make, reason in WRONG.values()}
    covered |= {"peer_trust_domain", "peer_unexpected", "peer_revoked", "peer_certificate_missing"}
    assert covered == {kind.reason for kind in errors.UntrustedPeer.__subclasses__()}

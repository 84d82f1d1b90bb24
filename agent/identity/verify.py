"""What a peer's certificate proves. Pure.

    chain, validity   by OpenSSL during the handshake; `explain` gives its refusals our names
    everything else   here, from the certificate's own bytes: it is no CA's, its key may sign, it is
                      meant for the peer's part, its only URI is a SPIFFE id
    a server asks     is the trust domain ours, or an alias of it?
    a client asks     is it the identity of the workload that I dial?

Each wrong certificate has a class of its own below UntrustedPeer, whose `reason` goes into the log;
the peer gets a reset and no word.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.errors import (
    PeerAuthorityUnknown,
    PeerCertificateMissing,
    PeerExpired,
    PeerIsAuthority,
    PeerNames,
    PeerNotYetValid,
    PeerRevoked,
    PeerTrustDomain,
    PeerUnexpected,
    PeerUsage,
    UntrustedPeer,
)
from agent.identity.der import read_certificate
from agent.model.identity import SpiffeId, parse_spiffe_id

if TYPE_CHECKING:
    from collections.abc import Set

    from agent.identity.der import CertificateFacts

FINGERPRINT_BYTES = hashlib.sha256().digest_size
# x509_vfy.h: what OpenSSL's verification says, in our words.
REFUSALS: dict[int, type[UntrustedPeer]] = {
    2: PeerAuthorityUnknown,  # the issuer's certificate is not there
    7: PeerAuthorityUnknown,  # a signature is wrong
    9: PeerNotYetValid,
    10: PeerExpired,
    18: PeerAuthorityUnknown,  # self-signed
    19: PeerAuthorityUnknown,  # an unknown root at the end of the chain
    20: PeerAuthorityUnknown,
    21: PeerAuthorityUnknown,
    24: PeerAuthorityUnknown,  # signed by something that is no CA; 79 since OpenSSL 3
    26: PeerUsage,
    79: PeerAuthorityUnknown,
}


class Part(enum.Enum):
    """The part that a peer plays, as the extended key usage that it needs."""

    CLIENT = bytes.fromhex("2b06010505070302")  # 1.3.6.1.5.5.7.3.2
    SERVER = bytes.fromhex("2b06010505070301")


@dataclass(frozen=True, slots=True)
class Peer:
    """What a certificate proved. `fingerprint` stands for it in a list of revoked ones."""

    identity: SpiffeId
    serial: int
    expires: float
    fingerprint: bytes


def fingerprint(issuer: bytes, serial: int) -> bytes:
    """Name a certificate as a revocation list does: by issuer and serial number."""
    size = (serial.bit_length() + 8) // 8
    return hashlib.sha256(issuer + serial.to_bytes(size, "big", signed=True)).digest()


def verify_peer(certificate: bytes | None, part: Part, revoked: Set[bytes], now: float) -> Peer:
    """Check all that does not depend on who is expected (UntrustedPeer)."""
    if certificate is None:
        raise PeerCertificateMissing("the peer showed no certificate")
    try:
        facts = read_certificate(certificate)
    except ValueError as error:
        raise UntrustedPeer(f"the peer's certificate cannot be read: {error}") from error
    if facts.not_before > now:
        raise PeerNotYetValid("the peer's certificate is not valid yet")
    if facts.not_after <= now:
        raise PeerExpired("the peer's certificate has ended")
    if facts.is_authority:
        raise PeerIsAuthority("the peer shows the certificate of a CA as its own")
    if facts.may_sign_data is False:
        raise PeerUsage("the key of the peer's certificate may not sign")
    if facts.purposes is not None and part.value not in facts.purposes:
        raise PeerUsage(f"the peer's certificate is not meant for a {part.name.lower()}")
    found = fingerprint(facts.issuer, facts.serial)
    if found in revoked:
        raise PeerRevoked(f"the peer's certificate {facts.serial:x} is revoked")
    return Peer(_only_uri(facts), facts.serial, facts.not_after, found)


def _only_uri(facts: CertificateFacts) -> SpiffeId:
    # SPIFFE X.509-SVID §2: exactly one URI. Names of other kinds, which SPIRE gives out where it is
    # asked to, are for other protocols.
    found = [name for kind, name in facts.names if kind == "URI"]
    if len(found) != 1:
        shown = ", ".join(f"{kind}:{name}" for kind, name in facts.names) or "nothing"
        raise PeerNames(f"the peer's certificate names {shown}, not one SPIFFE id")
    try:
        return parse_spiffe_id(found[0])
    except ValueError as error:
        raise PeerNames(str(error)) from error


def require_trust_domain(peer: Peer, trust_domains: Set[str]) -> None:
    """Let in our own (PeerTrustDomain)."""
    if peer.identity.trust_domain not in trust_domains:
        raise PeerTrustDomain(f"{peer.identity} is not of trust domain {min(trust_domains)}")


def require_identity(peer: Peer, expected: SpiffeId) -> None:
    """Accept the workload that was dialed and nobody else (PeerUnexpected)."""
    if peer.identity != expected:
        raise PeerUnexpected(f"the peer is {peer.identity}, not {expected}")


def explain(verify_code: int, text: str) -> UntrustedPeer:
    """Name a refusal of OpenSSL's verification."""
    kind = REFUSALS.get(verify_code, UntrustedPeer)
    return kind(f"TLS does not accept the peer's certificate: {text}")

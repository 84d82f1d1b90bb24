"""The signing core of the CA: what a certificate of the mesh looks like, and who stands behind it.

Holds one key pair in memory, signs, and knows no callers, no files and no network; `service` asks
who may have what, `custody` keeps the key. The roots that it hands out may be more than the one
that it signs with: that is how a root is replaced.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.errors import NoAuthority, RequestInvalid
from agent.identity import keys

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv6Address

    from agent.model.identity import SpiffeId

ROOT_LIFETIME = timedelta(days=3650)
# Two nodes' clocks may differ; a certificate must not be from the future on the other one.
BACKDATE = timedelta(minutes=2)
SIGNING_CURVES = ("secp256r1", "secp384r1")
# What cryptography says to an encoding that it cannot read, beside a ValueError.
PARSE_ERRORS = (
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
PEM = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True)
class Material:
    """What a CA consists of, as PEM texts: it signs with `key` as the owner of `certificate`.

    `intermediates` lead from there to one of `roots`; none if the certificate is a root itself.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    intermediates: bytes
    roots: bytes


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def create_root(organization: str) -> Material:
    """Make a self-signed root."""
    key = keys.generate()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization),
            # Two roots of one organization stay apart in chains and revocation lists.
            x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{x509.random_serial_number():x}"[:16]),
        ]
    )
    now = datetime.now(UTC)
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + ROOT_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(is_authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = root.public_bytes(PEM)
    return Material(pem, keys.build_pem(key), b"", pem)


def load_certificates(text: bytes, place: str) -> list[x509.Certificate]:
    """Read PEM certificates; an empty text has none (NoAuthority names the place)."""
    if not text.strip():
        return []
    try:
        return x509.load_pem_x509_certificates(text)
    except (ValueError, *PARSE_ERRORS) as error:
        raise NoAuthority(f"{place} is not PEM of certificates: {error}") from error


def is_chain(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> bool:
    """Whether each certificate is signed by the next, and the last by one of the roots."""
    for signed, by in itertools.pairwise(chain):
        if not _is_signed_by(signed, by):
            return False
    return any(chain[-1] == root or _is_signed_by(chain[-1], root) for root in roots)


def _is_signed_by(signed: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        signed.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


class Authority:
    """Signs; immutable, a newer key is a new Authority."""

    def __init__(self, material: Material) -> None:
        """Take over the key pair (NoAuthority if the parts do not fit together)."""
        self._key = keys.parse_pem(material.key, "the CA's key")
        found = load_certificates(material.certificate, "the CA's certificate")
        if len(found) != 1:
            raise NoAuthority(f"the CA's certificate is {len(found)} certificates, not one")
        self.certificate = found[0]
        if self.certificate.public_key() != self._key.public_key():
            raise NoAuthority("the CA's key does not belong to the CA's certificate")
        try:
            constraints = self.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        except x509.ExtensionNotFound:
            raise NoAuthority("the CA's certificate does not say that it is a CA's") from None
        if not constraints.value.ca:
            raise NoAuthority("the CA's certificate says that it is no CA's")
        intermediates = load_certificates(material.intermediates, "the CA's chain")
        self.roots = load_certificates(material.roots, "the CA's roots")
        if not is_chain([self.certificate, *intermediates], self.roots):
            raise NoAuthority("the CA's certificate and chain do not lead to one of its roots")
        if self.certificate.not_valid_after_utc <= datetime.now(UTC):
            ended = self.certificate.not_valid_after_utc.isoformat()
            raise NoAuthority(f"the CA's certificate has ended ({ended})")
        self.is_root = self.certificate in self.roots
        above = [] if self.is_root else [self.certificate, *intermediates]
        self._above = [certificate.public_bytes(PEM).decode() for certificate in above]
        self._bundle = b"".join(root.public_bytes(PEM) for root in self.roots).decode()
        self._issuer = self.certificate.subject
        self._authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(
            self._key.public_key()
        )

    @property
    def bundle(self) -> str:
        """All trusted roots, PEM."""
        return self._bundle

    def sign_request(self, csr: str, identity: SpiffeId, lifetime: timedelta) -> list[str]:
        """Sign a request for exactly this identity.

        Returns PEM texts: the leaf, what is between it and the root, then all trusted roots in one.

        Raises:
            RequestInvalid: the request is malformed, asks for another name, or its key is weak.
        """
        try:
            request = x509.load_pem_x509_csr(csr.encode())
            is_genuine = request.is_signature_valid
            extensions = request.extensions
            key = request.public_key()
        except (ValueError, TypeError, *PARSE_ERRORS) as error:
            raise RequestInvalid("the signing request cannot be read") from error
        if not is_genuine:
            raise RequestInvalid("the signing request is not signed by the key that it is for")
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in SIGNING_CURVES:
            raise RequestInvalid("the key is not an elliptic-curve key on P-256 or P-384")
        try:
            names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        except x509.ExtensionNotFound:
            names = []
        if names != [x509.UniformResourceIdentifier(str(identity))]:
            raise RequestInvalid(f"the signing request does not name exactly {identity}")
        leaf = self._sign(
            key,
            [x509.UniformResourceIdentifier(str(identity))],
            lifetime,
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
        )
        return [leaf.public_bytes(PEM).decode(), *self._above, self._bundle]

    def sign_server(
        self,
        key: keys.PrivateKey,
        hosts: Sequence[str],
        addresses: Sequence[IPv4Address | IPv6Address],
        lifetime: timedelta,
    ) -> bytes:
        """Sign the CA's own TLS certificate; returns its chain in PEM."""
        names = [
            *(x509.DNSName(host) for host in hosts),
            *(x509.IPAddress(address) for address in addresses),
        ]
        leaf = self._sign(key.public_key(), names, lifetime, [ExtendedKeyUsageOID.SERVER_AUTH])
        return leaf.public_bytes(PEM) + "".join(self._above).encode()

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        lifetime: timedelta,
        purposes: list[x509.ObjectIdentifier],
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - BACKDATE, self.certificate.not_valid_before_utc))
            # Nothing outlives what stands behind it.
            .not_valid_after(min(now + lifetime, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            # RFC 5280 §4.2.1.6: critical, since the subject is empty.
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(self._authority_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )

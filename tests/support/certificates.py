"""Certificates of every kind, right and wrong, with the cryptography package."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.identity import keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric import ec

SPIFFE = x509.UniformResourceIdentifier("spiffe://cluster.local/ns/shop/sa/client")
BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
PEM = serialization.Encoding.PEM
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Made:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)

    @property
    def key_pem(self) -> bytes:
        return keys.build_pem(self.key)


def usage(*, signs_data: bool = True, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs_data,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not signs_data and not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


class Maker:
    """A root of its own; signs whatever it is asked for."""

    def __init__(self, name: x509.Name | None = None, until: datetime | None = None) -> None:
        own = x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"test root {next(_numbers)}")
        self.root = self._root(
            name or x509.Name([own]), until or datetime.now(UTC) + timedelta(days=3650)
        )

    @staticmethod
    def _root(name: x509.Name, until: datetime) -> Made:
        key = keys.generate()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=365))
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage(signs_data=False, signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return Made(certificate, key)

    def leaf(
        self,
        names: Sequence[x509.GeneralName] = (SPIFFE,),
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        is_authority: bool = False,
        signs_data: bool = True,
        purposes: Sequence[x509.ObjectIdentifier] | None = BOTH,
        by: Made | None = None,
        subject: x509.Name | None = None,
    ) -> Made:
        """Make a certificate; what is not said is right."""
        key = keys.generate()
        now = datetime.now(UTC)
        signer = by or self.root
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject or x509.Name([]))
            .issuer_name(signer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before or now - timedelta(minutes=2))
            .not_valid_after(not_after or now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(
                usage(signs_data=signs_data, signs_certificates=is_authority), critical=True
            )
        )
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        return Made(builder.sign(signer.key, hashes.SHA256()), key)

    def intermediate(self, name: str) -> Made:
        """Make a CA below the root."""
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
        return self.leaf(
            (), is_authority=True, signs_data=False, purposes=None, subject=subject,
            not_after=datetime.now(UTC) + timedelta(days=30),
        )  # fmt: skip

    def crl(self, *revoked: Made, by: Made | None = None) -> bytes:
        """Make a list of revoked certificates, PEM; overdue on purpose."""
        signer = by or self.root
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(signer.certificate.subject)
            .last_update(now - timedelta(days=2))
            .next_update(now - timedelta(days=1))
        )
        for made in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(made.certificate.serial_number)
                .revocation_date(now - timedelta(days=2))
                .build()
            )
        return builder.sign(signer.key, hashes.SHA256()).public_bytes(PEM)

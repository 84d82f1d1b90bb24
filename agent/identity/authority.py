"""A certificate authority in a directory, shared by the agents of a lab.

    <directory>/root.pem   the root certificate
    <directory>/key.pem    its key, mode 0600

It stands behind the Issuer interface for labs and demos on one machine. It checks no caller: who
can read the directory can have any identity.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.errors import NoCertificate
from agent.identity.issuer import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    from agent.model.identity import SpiffeId

ROOT_LIFETIME = timedelta(days=3650)
LEAF_LIFETIME = timedelta(hours=24)
# Two nodes' clocks may differ; a certificate must not be from the future on the other one.
BACKDATE = timedelta(minutes=2)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


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


class LocalAuthority:
    """Signs with the key in a directory; implements Issuer."""

    def __init__(self, directory: Path) -> None:
        """Open an authority (NoCertificate if its files are missing or wrong)."""
        try:
            self._roots = (directory / "root.pem").read_bytes()
            self._root = x509.load_pem_x509_certificate(self._roots)
            key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), None)
        except (OSError, ValueError) as error:
            raise NoCertificate(f"no authority can be opened in {directory}: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise NoCertificate(f"{directory}/key.pem is not an elliptic-curve key")
        self._key = key

    @classmethod
    def create(cls, directory: Path, trust_domain: str) -> LocalAuthority:
        """Make a new root in `directory`, or open the one that is there."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (directory / "key.pem").exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain)])
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
                .add_extension(
                    x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
                )
                .sign(key, hashes.SHA256())
            )
            (directory / "root.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(directory / "key.pem", flags, 0o600), "wb") as file:
                file.write(_pem_key(key))
        return cls(directory)

    def issue(self, identity: SpiffeId) -> Certificate:
        """Make a key and sign a certificate with the SPIFFE id as its only name."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        expires = now + LEAF_LIFETIME
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            # RFC 5280 §4.2.1.6: critical, since the subject is empty.
            .add_extension(names, critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        chain = leaf.public_bytes(serialization.Encoding.PEM)
        return Certificate(identity, chain, _pem_key(key), self._roots, expires)

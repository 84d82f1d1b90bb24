"""Private keys: P-256, made here, kept in memory; on disk only those of the CA."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import KeyExposed, NoAuthority

if TYPE_CHECKING:
    from pathlib import Path

    from agent.model.identity import SpiffeId

PrivateKey = ec.EllipticCurvePrivateKey


def generate() -> PrivateKey:
    """Make a P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def build_pem(key: PrivateKey) -> bytes:
    """Write a key as PKCS#8 text."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def parse_pem(text: bytes, place: str) -> PrivateKey:
    """Read an elliptic-curve key (NoAuthority names the place, never what was in it)."""
    try:
        key = serialization.load_pem_private_key(text, None)
    except (ValueError, TypeError):
        # Not chained: the cause may quote what it could not read.
        raise NoAuthority(f"{place} is not a private key without a password in PEM") from None
    if not isinstance(key, PrivateKey):
        raise NoAuthority(f"{place} is not an elliptic-curve key")
    return key


def build_csr(key: PrivateKey, identity: SpiffeId) -> bytes:
    """Ask for a certificate whose only name is the SPIFFE id."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        # RFC 5280 §4.2.1.6: critical, since the subject is empty.
        .add_extension(names, critical=True)
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def read_private(path: Path) -> bytes:
    """Read a file that only its owner may read.

    Raises:
        KeyExposed: others may read or write it, or it is another user's.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())  # of the file that is read, not of one swapped in
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise KeyExposed(
                f"{path} has mode {mode:04o}, so others can read it: chmod 600 {path}, and make a "
                "new key if somebody may have"
            )
        if status.st_uid != os.geteuid():
            raise KeyExposed(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}")
        return file.read()


def write_private(path: Path, content: bytes) -> None:
    """Write a file with mode 0600, whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)

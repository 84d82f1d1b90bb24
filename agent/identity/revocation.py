"""Lists of revoked certificates (RFC 5280 §5), as the fingerprints that workers compare.

A list counts only if somebody signed it whose certificates we accept. That it is overdue for an
update is no reason to ignore it; a certificate that no list speaks of is not revoked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from agent.errors import RevocationInvalid
from agent.identity.authority import PARSE_ERRORS
from agent.identity.verify import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable

BEGIN, END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"


def parse_revocations(content: bytes, issuers: Iterable[x509.Certificate]) -> frozenset[bytes]:
    """Read a file of lists, PEM (several) or DER (one).

    Raises:
        RevocationInvalid: it is no list, or nobody whom we trust signed it.
    """
    known = list(issuers)
    try:
        return _read(content, known)
    # Parts of a list are read when they are asked for, so what is wrong shows late.
    except (ValueError, TypeError, *PARSE_ERRORS) as error:
        raise RevocationInvalid(f"it is no list of revoked certificates: {error}") from error


def _read(content: bytes, known: list[x509.Certificate]) -> frozenset[bytes]:
    if BEGIN in content:
        parts = content.split(BEGIN)[1:]
        lists = [x509.load_pem_x509_crl(BEGIN + part.partition(END)[0] + END) for part in parts]
    else:
        lists = [x509.load_der_x509_crl(content)]
    found: set[bytes] = set()
    for revoked in lists:
        if not any(_is_signed_by(revoked, issuer) for issuer in known):
            raise RevocationInvalid(
                f"the list of {revoked.issuer.rfc4514_string() or 'nobody'} is not signed by a CA "
                "that is trusted here"
            )
        issuer = _content(revoked.issuer.public_bytes())
        found.update(fingerprint(issuer, entry.serial_number) for entry in revoked)
    return frozenset(found)


def _is_signed_by(revoked: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    if issuer.subject != revoked.issuer:
        return False
    try:
        return revoked.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # a CA's
    except (TypeError, ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False


def _content(name: bytes) -> bytes:
    """Strip the head of a DER sequence."""
    size = name[1]
    return name[2 + (size & 0x7F if size & 0x80 else 0) :]

"""Lists of revoked certificates: whose counts, and what it says."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from agent.errors import RevocationInvalid
from agent.identity.der import read_certificate
from agent.identity.revocation import parse_revocations
from agent.identity.verify import fingerprint
from tests.support.certificates import Made, Maker

DER = serialization.Encoding.DER


def mark(made: Made) -> bytes:
    facts = read_certificate(made.certificate.public_bytes(DER))
    return fingerprint(facts.issuer, facts.serial)


def test_several_lists_in_one_file_count_together() -> None:
    maker, other = Maker(), Maker()
    leaves = [maker.leaf(), maker.leaf(), other.leaf()]
    content = maker.crl(*leaves[:2]) + other.crl(leaves[2])
    issuers = [maker.root.certificate, other.root.certificate]
    assert parse_revocations(content, issuers) == {mark(leaf) for leaf in leaves}


def test_der_is_read_as_well() -> None:
    maker = Maker()
    leaf = maker.leaf()
    content = x509.load_pem_x509_crl(maker.crl(leaf)).public_bytes(DER)
    assert parse_revocations(content, [maker.root.certificate]) == {mark(leaf)}


def test_the_same_serial_number_of_another_issuer_is_not_meant() -> None:
    maker, other = Maker(), Maker()
    leaf = maker.leaf()
    found = parse_revocations(other.crl(leaf), [other.root.certificate])
    assert mark(leaf) not in found


@pytest.mark.parametrize("impostor_name", [None, "same"])
def test_a_list_of_a_stranger_is_refused(impostor_name: str | None) -> None:
    maker = Maker()
    name = maker.root.certificate.subject if impostor_name else None
    with pytest.raises(RevocationInvalid, match="not signed by a CA"):
        parse_revocations(Maker(name).crl(maker.leaf()), [maker.root.certificate])


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"],
)
def test_what_is_no_list_is_refused(content: bytes) -> None:
    with pytest.raises(RevocationInvalid, match="no list"):
        parse_revocations(content, [])

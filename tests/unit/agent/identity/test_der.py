"""The reader of certificates says what the cryptography package says."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import certifi
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from agent.identity import der
from tests.support.certificates import SPIFFE, Maker

DER = serialization.Encoding.DER
NOW = datetime.now(UTC).replace(microsecond=0)


def test_facts_of_a_leaf() -> None:
    maker = Maker()
    made = maker.leaf(
        names=[SPIFFE, x509.DNSName("a.example"), x509.RFC822Name("a@b.c")],
        not_before=NOW - timedelta(days=1),
        not_after=NOW + timedelta(days=9),
    )
    facts = der.read_certificate(made.certificate.public_bytes(DER))
    assert facts.serial == made.certificate.serial_number
    assert facts.not_before == made.certificate.not_valid_before_utc.timestamp()
    assert facts.not_after == made.certificate.not_valid_after_utc.timestamp()
    assert facts.names == (("URI", SPIFFE.value), ("DNS", "a.example"), ("email", "a@b.c"))
    assert not facts.is_authority
    assert facts.may_sign_data is True
    assert facts.issuer in maker.root.certificate.subject.public_bytes()
    assert facts.purposes is not None
    assert len(facts.purposes) == 2


def test_facts_of_a_root() -> None:
    facts = der.read_certificate(Maker().root.certificate.public_bytes(DER))
    assert facts.is_authority
    assert facts.may_sign_data is False
    assert facts.purposes is None
    assert facts.names == ()


def test_times_after_2049_are_read() -> None:
    late = datetime(2061, 5, 4, 3, 2, 1, tzinfo=UTC)
    made = Maker(until=late).leaf(not_after=late)
    facts = der.read_certificate(made.certificate.public_bytes(DER))
    assert facts.not_after == late.timestamp()


# One of the roots has a serial number that is not allowed, and is out there.
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_roots_of_the_public_web_are_read() -> None:
    text = Path(certifi.where()).read_bytes()
    found = der.decode_pem(text)
    assert len(found) > 100
    for data, expected in zip(found, x509.load_pem_x509_certificates(text), strict=True):
        facts = der.read_certificate(data)
        assert facts.serial == expected.serial_number
        assert facts.not_before == expected.not_valid_before_utc.timestamp()
        assert facts.not_after == expected.not_valid_after_utc.timestamp()
        assert facts.is_authority


def test_every_cut_is_a_value_error() -> None:
    data = Maker().leaf().certificate.public_bytes(DER)
    for size in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            der.read_certificate(data[:size])


def test_every_changed_byte_is_read_or_a_value_error() -> None:
    data = bytearray(Maker().leaf().certificate.public_bytes(DER))
    for position in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            data[position] ^= change
            with contextlib.suppress(ValueError):
                der.read_certificate(bytes(data))
            data[position] ^= change


def test_name_without_a_common_name_is_no_problem() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "x")])
    assert (
        der.read_certificate(Maker(name).leaf().certificate.public_bytes(DER)).issuer
        == name.public_bytes()[2:]
    )


def test_first_version_has_neither_version_nor_extensions() -> None:
    """As made by hand: serial, algorithm, issuer, validity, and no more."""

    def sequence(*parts: bytes) -> bytes:
        content = b"".join(parts)
        return bytes((0x30, len(content))) + content

    moment = b"\x17\x0d990102030405Z"
    serial, name = b"\x02\x01\x07", sequence(b"\x0c\x01x")
    fields = [serial, sequence(), name, sequence(moment, moment)]
    facts = der.read_certificate(sequence(sequence(*fields)))
    assert (facts.serial, facts.issuer, facts.names) == (7, b"\x0c\x01x", ())
    assert facts.not_before == datetime(1999, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    fields[3] = sequence(moment)
    with pytest.raises(ValueError, match="not a pair"):
        der.read_certificate(sequence(sequence(*fields)))
    fields[0] = sequence()
    with pytest.raises(ValueError, match="no serial number"):
        der.read_certificate(sequence(sequence(*fields)))

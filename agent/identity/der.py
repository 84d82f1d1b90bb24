"""Read an X.509 certificate's facts from its DER bytes. Pure, and without any library.

A worker has to know more of its peer's certificate than Python's `ssl` shows (is it a CA, what may
its key do), and holds no memory for a library that could tell. OpenSSL has checked signatures and
structure before; this reads what is there and trusts no length.

    Certificate  SEQUENCE { tbs, algorithm, signature }                              RFC 5280 §4.1
    tbs          SEQUENCE { [0] version, serial, algorithm, issuer, validity, subject, key,
                            [1] [2] unique ids, [3] extensions }
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SEQUENCE, INTEGER, OID, BOOLEAN, BIT_STRING, OCTET_STRING = 0x30, 0x02, 0x06, 0x01, 0x03, 0x04
UTC_TIME, GENERAL_TIME = 0x17, 0x18
VERSION, EXTENSIONS = 0xA0, 0xA3
URI_NAME = 0x86
NAME_KINDS = {0x81: "email", 0x82: "DNS", 0x86: "URI", 0x87: "IP"}  # GeneralName, §4.2.1.6
# The last two bytes of 2.5.29.x.
BASIC_CONSTRAINTS, KEY_USAGE, EXTENDED_KEY_USAGE, ALTERNATIVE_NAMES = (
    bytes((0x55, 0x1D, last)) for last in (19, 15, 37, 17)
)
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says of itself; names are (kind, text) pairs, None is "not said"."""

    serial: int
    issuer: bytes  # DER of the name
    not_before: float
    not_after: float
    names: tuple[tuple[str, str], ...]
    is_authority: bool
    may_sign_data: bool | None  # keyUsage digitalSignature
    purposes: frozenset[bytes] | None  # DER of the extended key usages


def _read(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Return tag, content and the position behind it (ValueError)."""
    if at + 2 > len(data):
        raise ValueError("the certificate is cut short")
    tag, size = data[at], data[at + 1]
    at += 2
    if size & 0x80:
        count = size & 0x7F
        if not 1 <= count <= 4 or at + count > len(data):
            raise ValueError("the certificate has a wrong length")
        size = int.from_bytes(data[at : at + count], "big")
        at += count
    if at + size > len(data):
        raise ValueError("the certificate is cut short")
    return tag, data[at : at + size], at + size


def _members(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        tag, content, at = _read(data, at)
        yield tag, content


def _expect(members: Iterator[tuple[int, bytes]], *tags: int) -> bytes:
    tag, content = next(members, (0, b""))
    if tag not in tags:
        raise ValueError(f"the certificate has {tag:#x} where another part belongs")
    return content


def _read_time(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == UTC_TIME:  # §4.1.2.5.1: two digits of the year, 50 and above are 19xx
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != GENERAL_TIME:
        raise ValueError("the certificate's validity is no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def read_certificate(data: bytes) -> CertificateFacts:
    """Read a certificate (ValueError if it is not one)."""
    tag, certificate, _end = _read(data, 0)
    if tag != SEQUENCE:
        raise ValueError("the certificate is no sequence")
    members = _members(_expect(_members(certificate), SEQUENCE))
    tag, content = next(members, (0, b""))
    if tag == VERSION:
        content = _expect(members, INTEGER)
    elif tag != INTEGER:
        raise ValueError("the certificate has no serial number")
    serial = int.from_bytes(content, "big", signed=True)
    _expect(members, SEQUENCE)
    issuer = _expect(members, SEQUENCE)
    validity = list(_members(_expect(members, SEQUENCE)))
    if len(validity) != 2:
        raise ValueError("the certificate's validity is not a pair")
    extensions: dict[bytes, bytes] = {}
    for tag, content in members:
        if tag == EXTENSIONS:
            for _tag, extension in _members(_expect(_members(content), SEQUENCE)):
                parts = list(_members(extension))
                if len(parts) < 2 or parts[0][0] != OID or parts[-1][0] != OCTET_STRING:
                    raise ValueError("the certificate has a wrong extension")
                extensions[parts[0][1]] = parts[-1][1]
    return CertificateFacts(
        serial,
        issuer,
        not_before=_read_time(*validity[0]),
        not_after=_read_time(*validity[1]),
        names=_read_names(extensions.get(ALTERNATIVE_NAMES)),
        is_authority=_read_is_authority(extensions.get(BASIC_CONSTRAINTS)),
        may_sign_data=_read_may_sign_data(extensions.get(KEY_USAGE)),
        purposes=_read_purposes(extensions.get(EXTENDED_KEY_USAGE)),
    )


def _read_names(extension: bytes | None) -> tuple[tuple[str, str], ...]:
    if extension is None:
        return ()
    _tag, content, _end = _read(extension, 0)
    return tuple(
        (NAME_KINDS.get(tag, f"kind {tag & 0x1F}"), value.decode("ascii", "backslashreplace"))
        for tag, value in _members(content)
    )


def _read_is_authority(extension: bytes | None) -> bool:
    if extension is None:
        return False
    _tag, content, _end = _read(extension, 0)
    return any(tag == BOOLEAN and value != b"\0" for tag, value in _members(content))


def _read_may_sign_data(extension: bytes | None) -> bool | None:
    if extension is None:
        return None
    _tag, content, _end = _read(extension, 0)
    return len(content) > 1 and bool(content[1] & 0x80)  # bit 0, after the count of unused bits


def _read_purposes(extension: bytes | None) -> frozenset[bytes] | None:
    if extension is None:
        return None
    _tag, content, _end = _read(extension, 0)
    return frozenset(value for _tag, value in _members(content))


def decode_pem(text: bytes) -> list[bytes]:
    """Return the certificates of a PEM text as DER (ValueError)."""
    return [base64.b64decode(body, validate=False) for body in _PEM.findall(text)]

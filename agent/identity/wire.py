"""The messages of CreateCertificate, in protobuf's wire format. Pure.

    IstioCertificateRequest    csr = 1 string (PEM), validity_duration = 3 int64 (seconds),
                               metadata = 4 google.protobuf.Struct
    IstioCertificateResponse   cert_chain = 1 repeated string (PEM, leaf first)

Of the metadata one text is of interest, ImpersonatedIdentity. Five fields do not need protobuf's
runtime in the agent (docs/decisions/0006-grpc-without-protobuf.md); fields that are not known are
skipped, as protobuf demands. Tests compare every byte with the protobuf package.

    tag = field number << 3 | kind      kind 0: varint, 1: 8 bytes, 2: length and bytes, 5: 4 bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "istio.v1.auth.IstioCertificateService"
METHOD = f"/{SERVICE}/CreateCertificate"
IMPERSONATED = "ImpersonatedIdentity"
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller wants signed; `impersonated` is the identity, empty if it named none."""

    csr: str
    validity_seconds: int
    impersonated: str


def _build_varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative int64 is its two's complement
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _build_field(number: int, content: bytes) -> bytes:
    return _build_varint(number << 3 | LENGTH) + _build_varint(len(content)) + content


def build_request(request: Request) -> bytes:
    """Encode a request."""
    made = _build_field(1, request.csr.encode()) if request.csr else b""
    if request.validity_seconds:
        made += _build_varint(3 << 3 | VARINT) + _build_varint(request.validity_seconds)
    if request.impersonated:
        value = _build_field(3, request.impersonated.encode())
        entry = _build_field(1, IMPERSONATED.encode()) + _build_field(2, value)
        made += _build_field(4, _build_field(1, entry))
    return made


def build_response(chain: list[str]) -> bytes:
    """Encode a response."""
    return b"".join(_build_field(1, certificate.encode()) for certificate in chain)


def _parse_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for position in range(LONGEST_VARINT):
        if at + position >= len(data):
            break
        byte = data[at + position]
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value & (1 << 64) - 1, at + position + 1
    raise ValueError("a number of the message is cut short or too long")


def _parse_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _parse_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError("a field of the message has number 0")
        if kind == VARINT:
            value, at = _parse_varint(data, at)
            yield number, value
            continue
        if kind == LENGTH:
            size, at = _parse_varint(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field of the message has the unknown kind {kind}")
        if at + size > len(data):
            raise ValueError("the message is cut short")
        if kind == LENGTH:  # none of our fields is a number of fixed size
            yield number, data[at : at + size]
        at += size


def _submessages(data: bytes, wanted: int) -> Iterator[bytes]:
    for number, value in _parse_fields(data):
        if number == wanted and isinstance(value, bytes):
            yield value


def _last_text(data: bytes, wanted: int) -> str:
    text = b""
    for value in _submessages(data, wanted):
        text = value
    return text.decode()


def parse_request(data: bytes) -> Request:
    """Decode a request (ValueError if it is not one)."""
    validity = 0
    impersonated = ""
    for number, value in _parse_fields(data):
        if number == 3 and isinstance(value, int):
            validity = value - (1 << 64) if value >> 63 else value
        elif number == 4 and isinstance(value, bytes):
            for entry in _submessages(value, 1):
                if _last_text(entry, 1) == IMPERSONATED:
                    wrapped = b"".join(_submessages(entry, 2))
                    impersonated = _last_text(wrapped, 3)
    return Request(_last_text(data, 1), validity, impersonated)


def parse_response(data: bytes) -> list[str]:
    """Decode a response (ValueError if it is not one)."""
    return [value.decode() for value in _submessages(data, 1)]

"""The messages of CreateCertificate, in protobuf's wire format. Pure.

    IstioCertificateRequest    csr = 1 string (PEM), validity_duration = 3 int64 (seconds),
                               metadata = 4 google.protobuf.Struct
    IstioCertificateResponse   cert_chain = 1 repeated string (PEM, leaf first)

Of the metadata one text is of interest, ImpersonatedIdentity. Five fields do not need protobuf's
runtime in the agent (docs/decisions/0006-grpc-without-protobuf.md); fields that are not known are
skipped, as protobuf demands. Tests compare every byte with the protobuf package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.protobuf import build_bytes, build_number, parse_fields

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "istio.v1.auth.IstioCertificateService"
METHOD = f"/{SERVICE}/CreateCertificate"
IMPERSONATED = "ImpersonatedIdentity"


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller wants signed; `impersonated` is the identity, empty if it named none."""

    csr: str
    validity_seconds: int
    impersonated: str


def build_request(request: Request) -> bytes:
    """Encode a request."""
    made = build_bytes(1, request.csr.encode()) if request.csr else b""
    if request.validity_seconds:
        made += build_number(3, request.validity_seconds)
    if request.impersonated:
        value = build_bytes(3, request.impersonated.encode())
        entry = build_bytes(1, IMPERSONATED.encode()) + build_bytes(2, value)
        made += build_bytes(4, build_bytes(1, entry))
    return made


def build_response(chain: list[str]) -> bytes:
    """Encode a response."""
    return b"".join(build_bytes(1, certificate.encode()) for certificate in chain)


def _submessages(data: bytes, wanted: int) -> Iterator[bytes]:
    for number, value in parse_fields(data):
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
    for number, value in parse_fields(data):
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

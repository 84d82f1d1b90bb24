"""protobuf's wire format, as much of it as our few messages need. Pure.

    message = fields, in any order    field = tag, content    tag = number << 3 | kind
    kind 0: varint, 1: 8 bytes, 2: length and bytes, 5: 4 bytes

Used for certificates (`agent.identity.wire`) and profiles (`agent.pprof`), which so need no
runtime of protobuf (docs/decisions/0006-grpc-without-protobuf.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
LONGEST_VARINT = 10


def build_varint(value: int) -> bytes:
    """Encode a number of 64 bits; a negative one is its two's complement."""
    value &= (1 << 64) - 1
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def build_number(number: int, value: int) -> bytes:
    """Encode a field that is a number."""
    return build_varint(number << 3 | VARINT) + build_varint(value)


def build_bytes(number: int, content: bytes) -> bytes:
    """Encode a field that is a text, bytes or another message."""
    return build_varint(number << 3 | LENGTH) + build_varint(len(content)) + content


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


def parse_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and content of each field (ValueError if it is no message).

    Numbers of fixed size are skipped: none of our messages has one.
    """
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
        if kind == LENGTH:
            yield number, data[at : at + size]
        at += size

"""Header blocks as we send them: HPACK literals, nothing remembered, nothing compressed (RFC 7541).

What HBONE sends is short and differs from stream to stream. A table of it would save fifty bytes of
a connection, and searching and coding it took an eighth of the time that the caller's worker spends
on one (docs/performance.md). What a peer sends is decoded by the hpack library. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# RFC 7541 §6.2.2, "Literal Header Field without Indexing": a new name, or one of the static table
# (appendix A), which is 4 bits of the first byte.
NEW_NAME = b"\x00"
AUTHORITY = b"\x01"
METHOD_CONNECT = b"\x02\x07CONNECT"
STATUS = b"\x08"
# §6.3: what a block begins with after the peer has named a size for our table, which is not used.
# Without it a peer that named a smaller one takes the block for an error (RFC 9113 §4.3.1).
TABLE_SIZE_0 = b"\x20"
STATUS_200 = b"\x88"  # §6.1: the whole field is entry 8 of the static table


def build_string(text: str) -> bytes:
    """Return a string literal, not Huffman coded (RFC 7541 §5.2); UnicodeEncodeError if not ASCII.

    Its length is an integer with a prefix of 7 bits (§5.1).
    """
    data = text.encode("ascii")
    size = len(data)
    if size < 127:
        return bytes((size,)) + data
    head = bytearray((127,))
    size -= 127
    while size >= 128:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + data


def build_request(authority: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Return the block of a CONNECT; names are in lower case (RFC 9113 §8.2)."""
    parts = [METHOD_CONNECT, AUTHORITY, build_string(authority)]
    for name, value in headers:
        parts += (NEW_NAME, build_string(name), build_string(value))
    return b"".join(parts)


def build_response(status: int) -> bytes:
    """Return the block of an answer."""
    return STATUS_200 if status == 200 else STATUS + build_string(str(status))

"""Header blocks as we send them, and the rules for those of a peer.

Ours are HPACK literals: nothing remembered, nothing compressed (RFC 7541). What HBONE sends is
short and differs from stream to stream. A table of it would save fifty bytes of a connection, and
searching and coding it took an eighth of the time that the caller's worker spends on one
(docs/performance.md). Blocks of such literals, ours among them, are read here as well; what a peer
sends otherwise is decoded by the hpack library. Both are held here to RFC 9113 §8. Pure.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    Fields = Iterable[tuple[str, str]]

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


# RFC 7541 appendix A: the names of the entries whose number fits into 4 bits, from 1 on.
STATIC_NAMES = (
    ":authority", ":method", ":method", ":path", ":path", ":scheme", ":scheme",
    ":status", ":status", ":status", ":status", ":status", ":status", ":status",
)  # fmt: skip
LONGEST = 126  # of a string whose length is one byte without Huffman's bit (§5.2)
FIELD_OVERHEAD = 32  # RFC 9113 §6.5.2


def read_literals(block: bytes, limit: int) -> list[tuple[str, str]] | None:
    """Return the fields of a block of short literals that are neither indexed nor Huffman coded.

    None for any other block, a malformed one and one of more than `limit` bytes (RFC 9113 §6.5.2):
    those are the decoder's, whose table no literal of these changes (RFC 7541 §6.2.2, §6.2.3).
    """
    fields = []
    at, end = 0, len(block)
    while at < end:
        number = block[at] & 0x0F
        if block[at] >= 0x20 or number == 0x0F:
            return None
        at += 1
        if number:
            name = STATIC_NAMES[number - 1]
        else:
            size = block[at] if at < end else end
            if size > LONGEST:
                return None
            at += 1 + size
            # A name that is not ASCII is malformed, a value may be any bytes (RFC 9113 §8.2.1).
            name = str(block[at - size : at], "latin-1")
        size = block[at] if at < end else end
        if size > LONGEST:
            return None
        at += 1 + size
        limit -= len(name) + size + FIELD_OVERHEAD
        if at > end or limit < 0:
            return None
        fields.append((name, str(block[at - size : at], "utf-8", "replace")))
    return fields


# RFC 9113 §8.2.1: visible ASCII without upper case and colon; and what no value may have.
NAME = re.compile(r"[!-9;-@\[-~]+")
NO_VALUE = re.compile(r"[\0\r\n]|^[ \t]|[ \t]$")
# §8.2.2; `te` is allowed with one value.
OF_ONE_CONNECTION = frozenset(
    {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"}
)
# What peers send with nearly every request, and so need not look at in detail.
USUAL_NAMES = frozenset({"baggage", "forwarded", "traceparent"})
REQUEST_NAMES = frozenset({":method", ":scheme", ":authority", ":path"})
RESPONSE_NAMES = frozenset({":status"})


def find_request_fault(fields: Fields) -> str | None:
    """Return why a request is malformed (RFC 9113 §8.1.1), None if it is not."""
    pseudo: dict[str, str] = {}
    fault = _read(fields, REQUEST_NAMES, pseudo)
    if fault is not None:
        return fault
    if pseudo.get(":method") == "CONNECT":  # §8.5
        if ":scheme" in pseudo or ":path" in pseudo:
            return "CONNECT carries :scheme or :path"
        return None if pseudo.get(":authority") else "there is no :authority"
    missing = [name for name in (":method", ":scheme", ":path") if not pseudo.get(name)]
    return f"there is no {missing[0]}" if missing else None


def find_response_fault(fields: Fields, *, ends: bool) -> str | None:
    """Return why an answer is malformed (RFC 9113 §8.1.1), None if it is not.

    `ends` says that nothing follows it, which an interim answer may not claim (§8.1).
    """
    pseudo: dict[str, str] = {}
    fault = _read(fields, RESPONSE_NAMES, pseudo)
    if fault is not None:
        return fault
    status = pseudo.get(":status", "")
    if not (len(status) == 3 and status.isascii() and status.isdigit()):
        return "there is no :status of three digits"
    return "an interim answer ends the stream" if ends and status[0] == "1" else None


def _read(fields: Fields, known: frozenset[str], pseudo: dict[str, str]) -> str | None:
    """Fill `pseudo` and return None, or why the fields are malformed."""
    is_pseudo_over = False
    for name, value in fields:
        if name[:1] == ":":
            if name not in known:
                return f"there is no pseudo-header {name!r} here"
            if name in pseudo:
                return f"{name} comes twice"
            if is_pseudo_over:
                return f"{name} comes after other fields"
            pseudo[name] = value
        else:
            is_pseudo_over = True
            if name not in USUAL_NAMES:
                if NAME.fullmatch(name) is None:
                    return f"{name!r} is no name of a field"
                if name in OF_ONE_CONNECTION or (name == "te" and value != "trailers"):
                    return f"{name!r} is for HTTP/1"
        # Most values are plain text: two calls, where the expression takes several times as long.
        is_plain = value.isprintable() and value.strip(" ") == value
        if not is_plain and NO_VALUE.search(value) is not None:
            return f"{name!r} has a value that is not allowed"
    return None

"""Header blocks: the bytes of RFC 7541, and what the library that peers may use reads in them."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel.headers import (
    OF_ONE_CONNECTION,
    TABLE_SIZE_0,
    build_request,
    build_response,
    build_string,
    find_request_fault,
    find_response_fault,
    read_literals,
)


@pytest.mark.parametrize(
    ("size", "head"), [(0, "00"), (1, "01"), (126, "7e"), (127, "7f00"), (254, "7f7f"),
                       (255, "7f8001"), (1337, "7fba09"), (20_000, "7fa19b01")],
)  # fmt: skip
def test_string_has_its_length_before_it(size: int, head: str) -> None:
    """RFC 7541 §5.1; (1337 - 127) % 128 + 128 is 0xba, (1337 - 127) // 128 is 9."""
    assert build_string("x" * size) == bytes.fromhex(head) + b"x" * size


def test_text_that_is_not_ascii_is_a_defect() -> None:
    with pytest.raises(UnicodeEncodeError):
        build_string("ü")


NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=200)
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=300)


@given(VALUES, st.lists(st.tuples(NAMES, VALUES), max_size=8), st.booleans())
def test_request_is_read_as_it_was_meant(
    authority: str, headers: list[tuple[str, str]], owes_size: bool
) -> None:
    block = build_request(authority, headers)
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = 0 if owes_size else 4096
    # Twice: what was said before changes nothing.
    for start in (TABLE_SIZE_0, b"") if owes_size else (b"", b""):
        found = [(str(name), str(value)) for name, value in decoder.decode(start + block)]
        assert found == [(":method", "CONNECT"), (":authority", authority), *headers]
    assert len(decoder.header_table.dynamic_entries) == 0


@pytest.mark.parametrize("status", [200, 400, 401, 503])
def test_answer_is_read_as_it_was_meant(status: int) -> None:
    found = [
        (str(name), str(value)) for name, value in hpack.Decoder().decode(build_response(status))
    ]
    assert found == [(":status", str(status))]


def test_usual_answer_is_one_byte() -> None:
    assert build_response(200) == b"\x88"


def by_library(block: bytes, limit: int = 1 << 16) -> list[tuple[str, str]] | None:
    """Decode by the library, as `connection` does; None if it refuses the block."""
    try:
        found = hpack.Decoder(max_header_list_size=limit).decode(block, raw=True)
    except hpack.HPACKError:
        return None
    return [(str(name, "latin-1"), str(value, "utf-8", "replace")) for name, value in found]


SHORT_NAMES, SHORT_VALUES = (each.filter(lambda text: len(text) < 127) for each in (NAMES, VALUES))


@given(SHORT_VALUES, st.lists(st.tuples(SHORT_NAMES, SHORT_VALUES), max_size=8))
def test_short_literals_are_read_without_the_library(
    authority: str, headers: list[tuple[str, str]]
) -> None:
    block = build_request(authority, headers)
    found = read_literals(block, 1 << 16)
    assert found is not None
    assert found == by_library(block)


PIECES = st.one_of(
    st.binary(max_size=3),
    st.builds(build_string, st.text("az:", max_size=140)),
    st.sampled_from([b"\0", b"\1", b"\x02", b"\x0e", b"\x0f", b"\x10", b"\x11", b"\x20", b"\x41"]),
)


@given(st.lists(PIECES, max_size=12).map(b"".join), st.sampled_from([0, 40, 100, 1 << 16]))
def test_what_is_read_without_the_library_is_what_the_library_reads(
    block: bytes, limit: int
) -> None:
    found = read_literals(block, limit)
    assert found in (None, by_library(block, limit))


@pytest.mark.parametrize(
    "block",
    [
        b"\x88",  # indexed
        b"\x41\x011",  # with indexing
        b"\x20\x01\x011",  # a size of the table
        b"\x0f\x01\x011",  # a number of more than 4 bits
        b"\x01\x811",  # Huffman
        b"\x00\x811\x011",
        b"\x01",  # cut short
        b"\x01\x021",
        b"\x00",
        b"\x00\x02a",
        b"\x00\x01a",
        build_request("x" * 127, []),
    ],
)
def test_any_other_block_is_the_librarys(block: bytes) -> None:
    assert read_literals(block, 1 << 16) is None


def test_block_beyond_the_limit_is_the_librarys() -> None:
    block = build_request("x" * 10, [])
    size = len(":methodCONNECT") + len(":authority") + 10 + 2 * 32
    assert read_literals(block, size) is not None
    assert read_literals(block, size - 1) is None


CONNECT = [(":method", "CONNECT"), (":authority", "10.0.0.1:80")]
GET = [(":method", "GET"), (":scheme", "https"), (":path", "/")]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (CONNECT, None),
        (GET, None),
        ([*CONNECT, ("te", "trailers"), ("x_!~", ""), ("y", "a b")], None),
        ([*CONNECT, ("baggage", "a=b"), ("x", "a\tb")], None),
        ([*CONNECT, ("baggage", "a\0b")], "'baggage' has a value"),
        ([(":method", "CONNECT")], "no :authority"),
        ([(":method", "CONNECT"), (":authority", "")], "no :authority"),
        ([*CONNECT, (":path", "/")], "carries :scheme or :path"),
        ([*CONNECT, (":scheme", "https")], "carries :scheme or :path"),
        ([(":authority", "10.0.0.1:80")], "no :method"),
        ([], "no :method"),
        (GET[:2], "no :path"),
        ([GET[0], GET[2]], "no :scheme"),
        ([*CONNECT, CONNECT[1]], "comes twice"),
        ([*CONNECT, (":status", "200")], "no pseudo-header ':status'"),
        ([*CONNECT, (":protocol", "websocket")], "no pseudo-header ':protocol'"),
        ([CONNECT[0], ("x", "y"), CONNECT[1]], "comes after"),
        ([*CONNECT, ("Baggage", "x")], "'Baggage' is no name"),
        ([*CONNECT, ("", "x")], "'' is no name"),
        ([*CONNECT, ("a b", "x")], "'a b' is no name"),
        ([*CONNECT, ("a:b", "x")], "'a:b' is no name"),
        ([*CONNECT, ("\xe9t\xe9", "x")], "is no name"),
        ([*CONNECT, ("x\x7f", "x")], "is no name"),
        ([*CONNECT, ("x", "a\nb")], "'x' has a value"),
        ([*CONNECT, ("x", "a\rb")], "'x' has a value"),
        ([*CONNECT, ("x", "a\0b")], "'x' has a value"),
        ([*CONNECT, ("x", " a")], "'x' has a value"),
        ([*CONNECT, ("x", "a\t")], "'x' has a value"),
        ([*CONNECT, ("te", "gzip")], "'te' is for HTTP/1"),
        *(([*CONNECT, (name, "x")], f"'{name}' is for HTTP/1") for name in OF_ONE_CONNECTION),
    ],
)
def test_request_is_held_to_the_rules_of_fields(
    fields: list[tuple[str, str]], fault: str | None
) -> None:
    found = find_request_fault(fields)
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)


@pytest.mark.parametrize(
    ("fields", "ends", "fault"),
    [
        ([(":status", "200"), ("server", "envoy")], False, None),
        ([(":status", "503")], True, None),
        ([(":status", "100")], False, None),
        ([(":status", "103")], True, "interim"),
        ([], True, "no :status"),
        ([(":status", "20")], False, "no :status"),
        ([(":status", "abc")], False, "no :status"),
        ([(":status", "\N{SUPERSCRIPT TWO}00")], False, "no :status"),
        ([(":status", "200"), (":method", "CONNECT")], False, "no pseudo-header"),
        ([("server", "x"), (":status", "200")], False, "comes after"),
    ],
)
def test_answer_is_held_to_the_rules_of_fields(
    fields: list[tuple[str, str]], ends: bool, fault: str | None
) -> None:
    found = find_response_fault(fields, ends=ends)
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)

"""Header blocks: the bytes of RFC 7541, and what the library that peers may use reads in them."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tunnel.headers import TABLE_SIZE_0, build_request, build_response, build_string


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

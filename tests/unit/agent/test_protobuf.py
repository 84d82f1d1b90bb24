"""protobuf's wire format, against Google's implementation."""

from __future__ import annotations

import pytest
from google.protobuf import wrappers_pb2
from hypothesis import given
from hypothesis import strategies as st

from agent.protobuf import build_bytes, build_number, build_varint, parse_fields


@given(st.integers(-(2**63), 2**63 - 1).filter(bool))
def test_number_is_what_protobuf_writes(value: int) -> None:
    theirs = wrappers_pb2.Int64Value(value=value).SerializeToString()
    assert build_number(1, value) == theirs
    assert list(parse_fields(theirs)) == [(1, value % 2**64)]


@given(st.binary(min_size=1))
def test_bytes_are_what_protobuf_writes(content: bytes) -> None:
    theirs = wrappers_pb2.BytesValue(value=content).SerializeToString()
    assert build_bytes(1, content) == theirs
    assert list(parse_fields(theirs)) == [(1, content)]


def test_numbers_of_fixed_size_are_skipped() -> None:
    double = wrappers_pb2.DoubleValue(value=1.5).SerializeToString()
    single = wrappers_pb2.FloatValue(value=1.5).SerializeToString()
    assert list(parse_fields(double + build_number(2, 7) + single)) == [(2, 7)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x0a\x05abc", "the message is cut short"),
        (b"\x19\x00", "the message is cut short"),
        (b"\x0a", "cut short or too long"),
        (b"\x18" + b"\xff" * 10, "cut short or too long"),
        (build_varint(0), "number 0"),
        (b"\x0b", "unknown kind 3"),
    ],
)
def test_what_is_no_message_is_a_value_error(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(parse_fields(data))

"""The frame codec against bytes written down from RFC 9113."""

from __future__ import annotations

import pytest

from agent.tunnel import frames
from agent.tunnel.frames import ErrorCode, FrameType, Setting


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (frames.build_head(0x012345, FrameType.DATA, 9, 0x0A0B0C0D), "012345 00 09 0a0b0c0d"),
        (frames.build_settings({}), "000000 04 00 00000000"),
        (
            frames.build_settings({Setting.ENABLE_PUSH: 0, Setting.MAX_FRAME_SIZE: 1 << 20}),
            "00000c 04 00 00000000 0002 00000000 0005 00100000",
        ),
        (frames.SETTINGS_ACK, "000000 04 01 00000000"),
        (frames.build_window_update(5, 0x7FFFFFFF), "000004 08 00 00000005 7fffffff"),
        (frames.build_reset(5, ErrorCode.CONNECT_ERROR), "000004 03 00 00000005 0000000a"),
        (frames.build_goaway(7, ErrorCode.NO_ERROR), "000008 07 00 00000000 00000007 00000000"),
        (frames.build_ping(b"abcdefgh", is_ack=False), "000008 06 00 00000000 6162636465666768"),
        (frames.build_ping(b"abcdefgh", is_ack=True), "000008 06 01 00000000 6162636465666768"),
    ],
)
def test_frame_has_the_bytes_of_the_standard(built: bytes, expected: str) -> None:
    assert built.hex() == expected.replace(" ", "")


def test_reserved_bit_is_ignored_where_it_stands() -> None:
    # RFC 9113 §4.1 and §6.8: it must be ignored when received.
    head = bytes.fromhex("000001 00 00 80000003")
    assert frames.parse_head(memoryview(head)) == (1, 0, 0, 3)
    goaway = bytes.fromhex("80000003 00000001")
    assert frames.parse_goaway(memoryview(goaway)) == (3, 1)


def test_payloads_are_read_as_they_were_built() -> None:
    settings = {Setting.INITIAL_WINDOW_SIZE: 2**31 - 1, Setting.HEADER_TABLE_SIZE: 0}
    payload = memoryview(frames.build_settings(settings))[frames.HEADER_BYTES :]
    assert frames.parse_settings(payload) == [(4, 2**31 - 1), (1, 0)]
    assert frames.parse_word(memoryview(b"\0\0\1\0rest")) == 256


def test_head_of_data_is_a_head() -> None:
    built = frames.build_data_head(70_000, frames.END_STREAM, 5)
    assert built == frames.build_head(70_000, frames.FrameType.DATA, frames.END_STREAM, 5)

"""HTTP/2 frames: the codec (RFC 9113 §4 and §6).

    +-----------------------------------------------+
    |                 Length (24)                   |
    +---------------+---------------+---------------+
    |   Type (8)    |   Flags (8)   |
    +-+-------------+---------------+-------------------------------+
    |R|                 Stream Identifier (31)                      |
    +=+=============================================================+
    |                   Frame Payload (0...)                      ...
    +---------------------------------------------------------------+

Only what HBONE uses is built; what a peer may send is named. Pure.
"""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
MAX_STREAM_ID = 2**31 - 1
MAX_WINDOW = 2**31 - 1
DEFAULT_WINDOW = 65535
DEFAULT_FRAME_BYTES = 16384
MAX_FRAME_BYTES = 2**24 - 1
PRIORITY_BYTES = 5


class FrameType(IntEnum):
    """RFC 9113 §6; a type that is not here is ignored (§5.5)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20


class ErrorCode(IntEnum):
    """RFC 9113 §7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class Setting(IntEnum):
    """RFC 9113 §6.5.2."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


_HEAD = struct.Struct(">HBBBI")  # 24 bits of length as 16 + 8
_WORD = struct.Struct(">I")
_PAIR = struct.Struct(">II")
_SETTING = struct.Struct(">HI")


def build_head(length: int, frame_type: int, flags: int, stream_id: int) -> bytes:
    """Return the 9 bytes before a payload of `length` bytes."""
    return _HEAD.pack(length >> 8, length & 0xFF, frame_type, flags, stream_id)


def build_data_head(length: int, flags: int, stream_id: int) -> bytes:
    """Return the head of a DATA frame."""
    return _HEAD.pack(length >> 8, length & 0xFF, 0, flags, stream_id)


def parse_head(data: memoryview, at: int = 0) -> tuple[int, int, int, int]:
    """Return (length, type, flags, stream id) of the 9 bytes of `data` from `at` on."""
    high, low, frame_type, flags, stream_id = _HEAD.unpack_from(data, at)
    return high << 8 | low, frame_type, flags, stream_id & MAX_STREAM_ID


def build_settings(values: dict[Setting, int]) -> bytes:
    """Return a SETTINGS frame."""
    payload = b"".join(_SETTING.pack(name, value) for name, value in values.items())
    return build_head(len(payload), FrameType.SETTINGS, 0, 0) + payload


def parse_settings(payload: memoryview) -> list[tuple[int, int]]:
    """Return the (name, value) pairs of a payload whose length is a multiple of 6."""
    return list(_SETTING.iter_unpack(payload))


SETTINGS_ACK = build_head(0, FrameType.SETTINGS, ACK, 0)


def build_window_update(stream_id: int, increment: int) -> bytes:
    """Return a WINDOW_UPDATE frame."""
    return build_head(4, FrameType.WINDOW_UPDATE, 0, stream_id) + _WORD.pack(increment)


def build_reset(stream_id: int, code: int) -> bytes:
    """Return a RST_STREAM frame."""
    return build_head(4, FrameType.RST_STREAM, 0, stream_id) + _WORD.pack(code)


def build_goaway(last_stream_id: int, code: int) -> bytes:
    """Return a GOAWAY frame without text: a peer gets codes, never our words."""
    return build_head(8, FrameType.GOAWAY, 0, 0) + _PAIR.pack(last_stream_id, code)


def build_ping(payload: bytes, *, is_ack: bool) -> bytes:
    """Return a PING frame; `payload` has 8 bytes."""
    return build_head(8, FrameType.PING, ACK if is_ack else 0, 0) + payload


def parse_word(payload: memoryview) -> int:
    """Return the first 32 bits."""
    (word,) = _WORD.unpack_from(payload)
    return int(word)


def parse_goaway(payload: memoryview) -> tuple[int, int]:
    """Return (last stream id, error code)."""
    last, code = _PAIR.unpack_from(payload)
    return last & MAX_STREAM_ID, code

"""What is written can be read, and says the same: identities, frames, keys of maps."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from agent.datapath import records
from agent.datapath.btf import Field, Layout
from agent.model.identity import SpiffeId, parse_spiffe_id
from agent.tunnel import frames
from agent.tunnel.frames import Setting

if TYPE_CHECKING:
    from agent.model.pod import Address

names = st.from_regex(r"[A-Za-z0-9._-]{1,60}", fullmatch=True).filter(
    lambda name: name not in {".", ".."}
)
domains = st.from_regex(r"[a-z0-9._-]{1,60}", fullmatch=True)
numbers = st.integers(0, 2**32 - 1)
streams = st.integers(0, frames.MAX_STREAM_ID)


@given(st.builds(SpiffeId, domains, names, names))
def test_identity_is_read_as_it_was_written(identity: SpiffeId) -> None:
    assert parse_spiffe_id(str(identity)) == identity


@given(st.text() | st.builds("spiffe://{}/ns/{}/sa/{}".format, st.text(), st.text(), st.text()))
def test_text_that_is_read_as_an_identity_is_the_one_that_it_would_write(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(parse_spiffe_id(text)) == text


@given(st.integers(0, frames.MAX_FRAME_BYTES), st.integers(0, 255), st.integers(0, 255), streams)
def test_head_is_read_as_it_was_written(length: int, kind: int, flags: int, stream: int) -> None:
    head = frames.build_head(length, kind, flags, stream)
    assert len(head) == frames.HEADER_BYTES
    assert frames.parse_head(memoryview(head)) == (length, kind, flags, stream)


def payload_of(frame: bytes) -> memoryview:
    """Return what follows a head, whose length must be right."""
    length, *_rest = frames.parse_head(memoryview(frame))
    assert len(frame) == frames.HEADER_BYTES + length
    return memoryview(frame)[frames.HEADER_BYTES :]


@given(st.dictionaries(st.sampled_from(Setting), numbers))
def test_settings_are_read_as_they_were_written(values: dict[Setting, int]) -> None:
    assert dict(frames.parse_settings(payload_of(frames.build_settings(values)))) == values


@given(streams, numbers)
def test_words_are_read_as_they_were_written(stream: int, word: int) -> None:
    assert frames.parse_goaway(payload_of(frames.build_goaway(stream, word))) == (stream, word)
    assert frames.parse_word(payload_of(frames.build_reset(stream, word))) == word
    assert frames.parse_word(payload_of(frames.build_window_update(stream, word))) == word


@given(st.binary(min_size=8, max_size=8), st.booleans())
def test_ping_is_read_as_it_was_written(payload: bytes, is_ack: bool) -> None:
    assert bytes(payload_of(frames.build_ping(payload, is_ack=is_ack))) == payload


# IPv6 has one value for what IPv4 is mapped to, and there it reads as IPv4.
addresses = st.ip_addresses(v=4) | st.ip_addresses(v=6).filter(
    lambda address: getattr(address, "ipv4_mapped", None) is None
)


@given(addresses)
def test_address_is_read_as_it_was_written(address: Address) -> None:
    assert records.unpack_address(records.pack_address(address)) == address


fields = st.tuples(st.sampled_from([1, 2, 4, 8]), st.booleans(), st.booleans())


@st.composite
def filled_layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, int | bytes]]:
    """A layout of numbers in both orders and of bytes, with a value for each member."""
    offset, members, values = 0, [], dict[str, int | bytes]()
    for place, (size, is_number, is_network_order) in enumerate(draw(st.lists(fields, max_size=8))):
        name = f"m{place}_be" if is_network_order else f"m{place}"
        members.append(Field(name, offset, size, is_number))
        offset += size
        if is_number:
            values[name] = draw(st.integers(0, 2 ** (8 * size) - 1))
        else:
            values[name] = draw(st.binary(min_size=size, max_size=size))
    return Layout("drawn", offset, tuple(members)), values


@given(filled_layouts())
def test_members_are_read_as_they_were_written(
    drawn: tuple[Layout, dict[str, int | bytes]],
) -> None:
    layout, values = drawn
    data = layout.encode(**values)
    assert len(data) == layout.size
    assert layout.decode(data) == values

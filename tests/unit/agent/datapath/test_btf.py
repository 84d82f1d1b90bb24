"""Layouts out of BTF that is written down here, byte by byte."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field

import pytest

from agent.datapath.btf import Field, Layout, TypeTable, integer_layout
from agent.errors import AbiMismatch

INT, POINTER, ARRAY, STRUCT, UNION, TYPEDEF, CONST, VAR = 1, 2, 3, 4, 5, 8, 10, 14


@dataclass
class Writer:
    """Builds a BTF object, as Documentation/bpf/btf.rst has it."""

    text: bytes = b"\0"
    types: bytes = b""
    count: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def _name(self, name: str) -> int:
        if not name:
            return 0
        if name not in self.names:
            self.names[name] = len(self.text)
            self.text += name.encode() + b"\0"
        return self.names[name]

    def add(self, name: str, kind: int, size_or_type: int, tail: bytes = b"", vlen: int = 0) -> int:
        """Append a type and return its id."""
        self.types += struct.pack("=III", self._name(name), kind << 24 | vlen, size_or_type) + tail
        self.count += 1
        return self.count

    def integer(self, name: str, size: int) -> int:
        return self.add(name, INT, size, struct.pack("=I", size * 8))

    def array(self, element: int, index: int, count: int) -> int:
        return self.add("", ARRAY, 0, struct.pack("=III", element, index, count))

    def struct(
        self, name: str, size: int, *members: tuple[str, int, int], kind: int = STRUCT
    ) -> int:
        tail = b"".join(
            struct.pack("=III", self._name(member), type_id, offset * 8)
            for member, type_id, offset in members
        )
        return self.add(name, kind, size, tail, len(members))

    def build(self) -> bytes:
        head = struct.pack(
            "=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.text)
        )
        return head + self.types + self.text


def number(name: str, offset: int, size: int) -> Field:
    return Field(name, offset, size, is_number=True)


def text(name: str, offset: int, size: int) -> Field:
    return Field(name, offset, size, is_number=False)


def test_struct_has_its_members_whatever_stands_between() -> None:
    writer = Writer()
    u16, u64 = writer.integer("u16", 2), writer.integer("u64", 8)
    writer.add("", POINTER, u64)
    writer.add("ss_pods", VAR, u64, struct.pack("=I", 0))
    be16 = writer.add("", CONST, writer.add("__be16", TYPEDEF, u16))
    address = writer.struct("", 16, ("bytes", writer.array(u16, u64, 8), 0), kind=UNION)
    wide = writer.array(writer.array(u16, u64, 2), u64, 3)
    source = writer.struct(
        "source", 40, ("cookie", u64, 0), ("address", address, 8), ("port_be", be16, 24),
        ("table", wide, 26), ("pad", u64, 32),
    )  # fmt: skip
    table = TypeTable(writer.build())
    assert table.layout(source) == Layout(
        "source",
        40,
        (
            number("cookie", 0, 8),
            text("address", 8, 16),
            number("port_be", 24, 2),
            text("table", 26, 12),
            number("pad", 32, 8),
        ),
    )
    assert table.layout(be16) == integer_layout(2)


def test_type_that_is_neither_struct_nor_integer_is_refused() -> None:
    writer = Writer()
    u8 = writer.integer("u8", 1)
    array, union = writer.array(u8, u8, 4), writer.struct("either", 1, ("a", u8, 0), kind=UNION)
    table = TypeTable(writer.build())
    with pytest.raises(AbiMismatch, match="type 2 is neither"):
        table.layout(array)
    with pytest.raises(AbiMismatch, match="type either is neither"):
        table.layout(union)


def test_other_bytes_are_refused() -> None:
    with pytest.raises(AbiMismatch, match="magic 0x4f"):
        TypeTable(b"O\0" + b"\0" * 30)
    writer = Writer()
    writer.integer("u64", 8)
    for cut in (10, 30):
        with pytest.raises(AbiMismatch, match="truncated"):
            TypeTable(writer.build()[:cut])


LAYOUT = Layout(
    "port",
    12,
    (number("cookie", 0, 4), number("port_be", 4, 2), text("name", 6, 4), number("pad", 10, 2)),
)


def test_numbers_have_the_order_that_their_name_says() -> None:
    encoded = LAYOUT.encode(cookie=1, port_be=80, name=b"ab")
    native = (1).to_bytes(4, sys.byteorder)
    assert encoded == native + b"\0\x50" + b"ab\0\0" + b"\0\0"
    assert LAYOUT.decode(encoded) == {"cookie": 1, "port_be": 80, "name": b"ab\0\0"}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 8, 16])
def test_number_of_any_size_is_read(size: int) -> None:
    data = bytes(range(1, size + 1))
    value = int.from_bytes(data, sys.byteorder)
    assert integer_layout(size).decode(data + b"behind it") == {"value": value}


def test_what_is_not_named_is_zero() -> None:
    assert LAYOUT.encode() == b"\0" * 12


def test_member_that_is_not_there_or_does_not_fit_is_refused() -> None:
    with pytest.raises(AbiMismatch, match="struct port has no member color, size"):
        LAYOUT.encode(size=1, color=2, cookie=3)
    with pytest.raises(AbiMismatch, match="name takes 4 bytes, not 5"):
        LAYOUT.encode(name=b"abcde")

"""Map layouts out of BTF, the type information that the kernel keeps with each map.

A layout exists once, in bpf/include/types.h; the loaded map carries it, and Python reads it from
there. Only what keys and values need is understood: integers and structs of integers, byte arrays
and nested structs (those as plain bytes). A field whose name ends in `_be` is in network order.

Source: Documentation/bpf/btf.rst of Linux 6.1. Pure: bytes in, layouts out.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field
from typing import Literal

from agent.errors import AbiMismatch

_MAGIC = 0xEB9F
_INT, _ARRAY, _STRUCT, _UNION = 1, 3, 4, 5
_TRANSPARENT = (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag
# Bytes after the common 12 of a type: fixed, and for each of its `vlen` members.
_TAIL = {1: 4, 3: 12, 14: 4, 17: 4}
_TAIL_PER_MEMBER = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}  # of numbers, for struct

Value = int | bytes


@dataclass(frozen=True, slots=True)
class Field:
    """One member: where it lies, and whether it is a number (else bytes)."""

    name: str
    offset: int
    size: int
    is_number: bool

    @property
    def byte_order(self) -> Literal["little", "big"]:
        return "big" if self.name.endswith("_be") else sys.byteorder

    @property
    def code(self) -> str:
        """How `struct` reads it: as a number, if it can, or else as bytes."""
        is_ours = self.is_number and self.byte_order == sys.byteorder
        return _CODES.get(self.size if is_ours else 0, f"{self.size}s")


@dataclass(frozen=True, slots=True)
class Layout:
    """A key or a value: its size and members; a plain integer has one member, `value`."""

    name: str
    size: int
    fields: tuple[Field, ...]
    # How `decode` reads it, made once: maps of many thousand entries are read at a time.
    _struct: struct.Struct = field(init=False, repr=False, compare=False)
    _names: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _numbers: tuple[Field, ...] = field(init=False, repr=False, compare=False)  # read as bytes

    def __post_init__(self) -> None:
        codes, at = "=", 0
        told = [each for each in self.fields if not each.name.startswith("pad")]
        for each in told:
            codes += f"{each.offset - at}x{each.code}"
            at = each.offset + each.size
        numbers = (each for each in told if each.is_number and each.code.endswith("s"))
        object.__setattr__(self, "_struct", struct.Struct(codes))
        object.__setattr__(self, "_names", tuple(each.name for each in told))
        object.__setattr__(self, "_numbers", tuple(numbers))

    def encode(self, **values: Value) -> bytes:
        """Return the bytes of `values`; what is not named is zero, padding too."""
        known = {member.name: member for member in self.fields}
        if unknown := values.keys() - known.keys():
            raise AbiMismatch(f"struct {self.name} has no member {', '.join(sorted(unknown))}")
        data = bytearray(self.size)
        for name, value in values.items():
            member = known[name]
            if isinstance(value, int):
                packed = value.to_bytes(member.size, member.byte_order)
            else:
                packed = value.ljust(member.size, b"\0")
            if len(packed) != member.size:
                raise AbiMismatch(
                    f"{self.name}.{name} takes {member.size} bytes, not {len(packed)}"
                )
            data[member.offset : member.offset + member.size] = packed
        return bytes(data)

    def decode(self, data: bytes) -> dict[str, Value]:
        """Return the members of `data` by name, without padding; what stands behind is left out."""
        values: dict[str, Value] = dict(
            zip(self._names, self._struct.unpack_from(data), strict=True)
        )
        for member in self._numbers:
            raw = values[member.name]
            assert isinstance(raw, bytes)
            values[member.name] = int.from_bytes(raw, member.byte_order)
        return values


def integer_layout(size: int) -> Layout:
    """Return the layout of a plain integer of `size` bytes."""
    return Layout("integer", size, (Field("value", 0, size, True),))


@dataclass(frozen=True, slots=True)
class _Type:
    name: str
    kind: int
    vlen: int
    size_or_type: int
    tail: bytes


class TypeTable:
    """The types of one BTF object."""

    def __init__(self, data: bytes) -> None:
        try:
            magic, _version, _flags, header, type_at, type_length, text_at, text_length = (
                struct.unpack_from("=HBBIIIII", data)
            )
            if magic != _MAGIC:
                raise AbiMismatch(f"BTF has magic {magic:#x}, not {_MAGIC:#x}")
            self._text = data[header + text_at : header + text_at + text_length]
            self._types = self._parse(data[header + type_at : header + type_at + type_length])
        except struct.error as error:
            raise AbiMismatch("BTF is truncated") from error

    def _name(self, offset: int) -> str:
        return self._text[offset : self._text.index(b"\0", offset)].decode()

    def _parse(self, data: bytes) -> list[_Type]:
        types = [_Type("void", 0, 0, 0, b"")]
        at = 0
        while at < len(data):
            name, info, size_or_type = struct.unpack_from("=III", data, at)
            kind, vlen = (info >> 24) & 0x1F, info & 0xFFFF
            length = _TAIL.get(kind, 0) + _TAIL_PER_MEMBER.get(kind, 0) * vlen
            tail = data[at + 12 : at + 12 + length]
            types.append(_Type(self._name(name), kind, vlen, size_or_type, tail))
            at += 12 + length
        return types

    def _resolve(self, type_id: int) -> _Type:
        found = self._types[type_id]
        while found.kind in _TRANSPARENT:
            found = self._types[found.size_or_type]
        return found

    def _size(self, found: _Type) -> int:
        if found.kind == _ARRAY:
            element, _index, count = struct.unpack("=III", found.tail)
            return self._size(self._resolve(element)) * int(count)
        return found.size_or_type

    def layout(self, type_id: int) -> Layout:
        """Return the layout of one type (AbiMismatch if it is not a struct or an integer)."""
        found = self._resolve(type_id)
        if found.kind == _INT:
            return integer_layout(found.size_or_type)
        if found.kind != _STRUCT:
            raise AbiMismatch(f"type {found.name or type_id} is neither struct nor integer")
        fields = []
        for index in range(found.vlen):
            name, member_id, bits = struct.unpack_from("=III", found.tail, index * 12)
            member = self._resolve(member_id)
            fields.append(
                Field(
                    self._name(name),
                    (bits & 0xFFFFFF) // 8,
                    self._size(member),
                    member.kind == _INT,
                )
            )
        return Layout(found.name, found.size_or_type, tuple(fields))

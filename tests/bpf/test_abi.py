"""What Python reads from the loaded maps' type information is what the C compiler laid out.

Python knows layouts only from BTF; here gcc is asked about the same header. Every member is
compared by name, offset and size: a swap of two members of one size changes no total.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from agent.datapath.source import MAPS, SOURCES

if TYPE_CHECKING:
    from pathlib import Path

    from agent.datapath.btf import Layout
    from agent.datapath.pins import Pins

HEAD = """\
#include <linux/types.h>
#include <stddef.h>
#include <stdio.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
#include "types.h"
"""


def declared_maps() -> dict[str, tuple[str, str, str]]:
    """Return kind, key type and value type of every map of maps.h, in order."""
    text = (SOURCES / "include/maps.h").read_text()
    found = re.findall(r'BPF_TABLE_PINNED\("(\w+)", ([\w ]+), ([\w ]+), (\w+),', text)
    return {name: (kind, key, value) for kind, key, value, name in found}


def members_of(struct: str) -> list[str]:
    """Return the members that types.h writes down for `struct x`, in order."""
    text = (SOURCES / "include/types.h").read_text()
    body = re.search(rf"^{struct} {{\n(.*?)^}};", text, re.DOTALL | re.MULTILINE)
    assert body is not None, struct
    return re.findall(r"(\w+)(?:\[\d+\])?;", body[1])


def compiled_layouts(types: set[str], folder: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Ask gcc: for each type its size, then each member's offset and size."""
    lines = [HEAD, "int main(void) {"]
    for c_type in sorted(types):
        lines.append(f'printf("{c_type}; 0 %zu\\n", sizeof({c_type}));')
        for member in members_of(c_type) if c_type.startswith("struct ") else ():
            size = f"sizeof((({c_type} *)0)->{member})"
            lines.append(
                f'printf("{c_type};{member} %zu %zu\\n", offsetof({c_type}, {member}), {size});'
            )
    source, program = folder / "layouts.c", folder / "layouts"
    source.write_text("\n".join([*lines, "return 0; }"]))
    command = [
        "gcc",
        "-Wall",
        "-Werror",
        f"-I{SOURCES / 'include'}",
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, timeout=30)
    printed = subprocess.run([program], check=True, capture_output=True, text=True, timeout=30)
    layouts: dict[str, list[tuple[str, int, int]]] = {}
    for line in printed.stdout.splitlines():
        c_type, rest = line.split(";")
        member, offset, size = rest.rsplit(" ", 2)
        layouts.setdefault(c_type, []).append((member.strip(), int(offset), int(size)))
    return layouts


def loaded_layout(layout: Layout) -> list[tuple[str, int, int]]:
    """Return a layout from BTF in the form of `compiled_layouts`."""
    total = ("", 0, layout.size)
    if layout.name == "integer":
        return [total]
    return [total] + [(field.name, field.offset, field.size) for field in layout.fields]


def test_maps_known_to_python_are_those_of_the_header() -> None:
    assert tuple(declared_maps()) == MAPS
    assert (SOURCES / "include/maps.h").read_text().count("\nBPF_TABLE_PINNED(") == len(MAPS)


def test_every_map_name_fits_the_kernel() -> None:
    assert [name for name in MAPS if len(name) > 15] == []


@pytest.mark.root
def test_keys_and_values_have_the_members_that_gcc_lays_out(loaded: Pins, tmp_path: Path) -> None:
    declared = declared_maps()
    types = {c_type for _kind, key, value in declared.values() for c_type in (key, value)}
    compiled = compiled_layouts(types, tmp_path)
    for name, (_kind, key, value) in declared.items():
        opened = loaded.maps[name]
        for c_type, layout in ((key, opened.key), (value, opened.value)):
            assert loaded_layout(layout) == compiled[c_type], f"{name}: {c_type}"
            expected = c_type.removeprefix("struct ") if " " in c_type else "integer"
            assert layout.name == expected, name


@pytest.mark.root
def test_sizes_that_the_kernel_uses_are_those_of_the_layouts(loaded: Pins) -> None:
    for name, opened in loaded.maps.items():
        facts = opened.facts
        assert (facts.key_size, facts.value_size) == (opened.key.size, opened.value.size), name


def test_keys_have_no_hidden_padding(tmp_path: Path) -> None:
    # A hash compares every byte of a key, so each byte must belong to a member.
    keys = {key for _kind, key, _value in declared_maps().values() if key.startswith("struct ")}
    for key, members in compiled_layouts(keys, tmp_path).items():
        assert sum(size for _name, _offset, size in members[1:]) == members[0][2], key

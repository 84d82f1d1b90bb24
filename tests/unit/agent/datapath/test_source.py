"""The text of the programs: expansion, hashes, and the stamped copy of the lookup."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from agent.datapath.source import (
    LD_IMM64,
    MAIN,
    MAPS,
    NETNS_COOKIE_MARK,
    PROGRAMS,
    PSEUDO_MAP_FD,
    SOURCES,
    expand,
    program_hash,
    relocatable_text,
    schema_hash,
    stamped_text,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "include").mkdir()
    (tmp_path / MAIN).write_text(
        '#include <linux/bpf.h>\n#include "maps.h"\n#include "types.h"\nend\n'
    )
    (tmp_path / "include/maps.h").write_text('#include "types.h"\nmaps\n')
    (tmp_path / "include/types.h").write_text("types\n")
    return tmp_path


def test_own_includes_are_put_in_place_once_and_lines_keep_their_numbers(sources: Path) -> None:
    main, maps, types = (sources / name for name in (MAIN, "include/maps.h", "include/types.h"))
    assert expand(MAIN, sources).splitlines() == [
        f'#line 1 "{main}"',
        "#include <linux/bpf.h>",
        f'#line 1 "{maps}"',
        f'#line 1 "{types}"',
        "types",
        f'#line 2 "{maps}"',
        "maps",
        f'#line 3 "{main}"',
        "",
        "end",
    ]


def test_include_that_is_not_there_is_an_error(sources: Path) -> None:
    with pytest.raises(StopIteration):
        expand("nothing.h", sources)


def test_hash_names_the_text_and_not_its_place(sources: Path, tmp_path: Path) -> None:
    schema, programs = schema_hash(sources), program_hash(sources)
    moved = tmp_path / "elsewhere"
    (moved / "include").mkdir(parents=True)
    for path in (MAIN, "include/maps.h", "include/types.h"):
        (moved / path).write_text((sources / path).read_text())
    assert (schema_hash(moved), program_hash(moved)) == (schema, programs)
    (moved / MAIN).write_text('#include "maps.h"\nother end\n')
    assert schema_hash(moved) == schema
    assert program_hash(moved) != programs
    (moved / "include/types.h").write_text("other types\n")
    assert schema_hash(moved) != schema


def test_every_program_of_the_list_has_an_entry_point() -> None:
    text = expand(MAIN, SOURCES)
    for name in PROGRAMS:
        assert f"int {name}(" in text


def load_map(fd: int) -> tuple[int, int]:
    """Return the two words of `r1 = map by descriptor`."""
    return LD_IMM64 | 1 << 8 | PSEUDO_MAP_FD << 12 | fd << 32, 0


def load_constant(value: int) -> tuple[int, int]:
    """Return the two words of `r2 = value`."""
    return LD_IMM64 | 2 << 8 | (value & 0xFFFFFFFF) << 32, value >> 32 << 32


OTHER = (0x00000000_000000B7, 0x00000000_00000095)  # r0 = 0; exit


def test_copy_has_this_machines_maps_and_the_pods_cookie() -> None:
    loaded = (*load_map(41), *load_constant(NETNS_COOKIE_MARK), *load_map(43), *OTHER)
    text = relocatable_text(struct.pack(f"={len(loaded)}Q", *loaded), {41: 0, 43: 2})
    cookie = 0x1122334455667788
    stamped = stamped_text(text, cookie, [7, 8, 9])
    assert struct.unpack(f"={len(loaded)}Q", stamped) == (
        *load_map(7),
        *load_constant(cookie),
        *load_map(9),
        *OTHER,
    )


def test_another_constant_stays_as_it_is() -> None:
    loaded = (*load_constant(0x51DE57E9_00000000), *OTHER)
    text = relocatable_text(struct.pack(f"={len(loaded)}Q", *loaded), {})
    assert struct.unpack(f"={len(loaded)}Q", stamped_text(text, 1, [])) == loaded


def test_map_names_are_unique() -> None:
    assert len(set(MAPS)) == len(MAPS)

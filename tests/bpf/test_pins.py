"""The pin directory: made once, opened by anybody, refused and left alone if it is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.datapath import libbpf, pins
from agent.datapath.source import MAPS, PROGRAMS, RING_BUFFERS, program_hash
from agent.errors import AbiMismatch, FeatureMissing, LoadError, PinsInUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

COMPILE_SECONDS = 2.0


@pytest.fixture
def root() -> Iterator[Path]:
    """Return a root of this test's own; whatever is pinned below it goes at the end."""
    place = Path(f"/sys/fs/bpf/sidestep-test-pins-{os.getpid()}")
    yield place
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if place.exists():
        place.rmdir()


@pytest.fixture
def directory(root: Path) -> Path:
    """Return a complete pin directory."""
    opened = pins.load(root)
    opened.close()
    return opened.directory


def snapshot(directory: Path) -> list[tuple[str, int, int]]:
    """Return everything below a directory, with inodes and times of change."""
    found = [directory, *sorted(directory.rglob("*"))]
    return [(str(path), path.stat().st_ino, path.stat().st_mtime_ns) for path in found]


def children() -> list[str]:
    """Return the command lines of this process's children, zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # proc(5): state and parent stand after the name, which may hold any character.
            parent = stat.read_text().rpartition(")")[2].split()[1]
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.append(command.replace("\0", " "))
    return found


def no_compile(staging: Path, maps: Path | None = None) -> list[int]:
    raise AssertionError(f"{staging} was compiled again, {maps}")


def test_compile_and_load_is_fast_and_its_child_is_gone(
    root: Path, measured: Callable[[str], None]
) -> None:
    before = children()
    begin = time.monotonic()
    opened = pins.load(root)
    seconds = time.monotonic() - begin
    opened.close()
    measured(f"compile and load: {seconds:.2f} s")
    assert children() == before
    assert sorted(path.name for path in root.iterdir()) == [opened.directory.name]
    assert seconds < COMPILE_SECONDS


def test_directory_holds_every_map_and_program(directory: Path) -> None:
    def names(part: str) -> set[str]:
        return {path.name for path in (directory / part).iterdir()}

    assert names("maps") == {*MAPS, *RING_BUFFERS}
    assert names("programs") == set(PROGRAMS)
    assert names("links") == set()


def test_second_open_needs_no_compiler(
    root: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(directory)
    monkeypatch.setattr(pins, "_compile", no_compile)
    opened = pins.load(root)
    opened.close()
    assert opened.directory == directory
    assert snapshot(directory) == before


def remove_a_map(directory: Path) -> None:
    (directory / "maps/ss_ports").unlink()


def remove_a_program(directory: Path) -> None:
    (directory / "programs/ss_bind4").unlink()


def remove_the_links(directory: Path) -> None:
    (directory / "links").rmdir()


def pin_again(directory: Path, existing: str, path: str) -> None:
    fd = libbpf.open_pin(directory / existing)
    libbpf.pin(fd, directory / path)
    os.close(fd)


def add_a_foreign_pin(directory: Path) -> None:
    pin_again(directory, "maps/ss_ports", "maps/other")


def swap_a_map(directory: Path) -> None:
    (directory / "maps/ss_pods").unlink()
    pin_again(directory, "maps/ss_pod_names", "maps/ss_pods")


def pin_a_program_as_a_map(directory: Path) -> None:
    (directory / "maps/ss_pods").unlink()
    pin_again(directory, "programs/ss_bind4", "maps/ss_pods")


def write_meta(directory: Path, **changed: int | bytes) -> None:
    opened = pins.Pins(directory)
    meta = dict(opened.meta) | changed
    opened.maps["ss_meta"].put({"value": 0}, meta)
    opened.close()


def write_another_magic(directory: Path) -> None:
    write_meta(directory, magic=1)


def write_another_schema(directory: Path) -> None:
    write_meta(directory, schema=b"0123456789abcdef")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_a_map, "ss_ports is missing"),
        (remove_a_program, "ss_bind4 is missing"),
        (remove_the_links, "links is missing"),
        (add_a_foreign_pin, "other is not ours"),
        (swap_a_map, "ss_pods is another map"),
        (pin_a_program_as_a_map, "ss_pods"),
        (write_another_magic, "no mark of Sidestep"),
        (write_another_schema, "another layout"),
    ],
)
def test_spoiled_directory_is_refused_and_left_alone(
    spoil: Callable[[Path], None],
    message: str,
    root: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(directory)
    before = snapshot(root)
    monkeypatch.setattr(pins, "_compile", no_compile)
    with pytest.raises(AbiMismatch, match=message) as refused:
        pins.load(root)
    assert str(directory) in str(refused.value)
    assert snapshot(root) == before


def program_ids(opened: pins.Pins) -> set[int]:
    found = set()
    for name in PROGRAMS:
        fd = opened.program(name)
        found.add(libbpf.program_facts(fd).id)
        os.close(fd)
    return found


@pytest.mark.parametrize("programs", [b"0123456789abcdef", b""])  # the second: half-way replaced
def test_programs_of_another_build_are_replaced_over_the_same_maps(
    root: Path, directory: Path, programs: bytes
) -> None:
    opened = pins.Pins(directory)
    before = {path.name: libbpf.map_facts(libbpf.open_pin(path)).id for path in maps_of(directory)}
    ids = program_ids(opened)
    opened.close()
    write_meta(directory, programs=programs)
    again = pins.load(root)
    after = {path.name: libbpf.map_facts(libbpf.open_pin(path)).id for path in maps_of(directory)}
    assert after == before
    assert not program_ids(again) & ids
    assert again.programs == program_hash()
    assert len(again.lookup_text()) == again.meta["lookup_instructions"]
    again.close()
    assert sorted(path.name for path in root.iterdir()) == [directory.name]


def maps_of(directory: Path) -> list[Path]:
    return sorted((directory / "maps").iterdir())


def test_maps_of_another_layout_beside_are_refused(root: Path, directory: Path) -> None:
    other = root / "0123456789abcdef"
    directory.rename(other)
    with pytest.raises(AbiMismatch, match="sidestep uninstall --pins") as refused:
        pins.load(root)
    assert str(other) in str(refused.value)
    assert [path.name for path in root.iterdir()] == [other.name]


def test_empty_directory_is_refused_and_left_alone(root: Path, directory: Path) -> None:
    pins.remove(directory)
    directory.mkdir()
    before = snapshot(root)
    with pytest.raises(AbiMismatch, match="is missing"):
        pins.load(root)
    assert snapshot(root) == before


def test_rest_of_a_killed_child_does_not_hinder(root: Path) -> None:
    (root / "loading/maps").mkdir(parents=True)
    pins.load(root).close()
    assert not (root / "loading").exists()


def test_failed_compile_says_why_and_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'error: no such header' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(LoadError, match="no such header"):
        pins.load(root)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("module", ["agent.datapath.pins", "agent.cli", "agent.enroll"])
def test_import_brings_no_compiler(module: str) -> None:
    # LLVM never gives its memory back, so bcc may only ever be in the child.
    program = (
        f"import sys, {module}; "
        "assert not [name for name in sys.modules if name.split('.')[0] == 'bcc']; "
        "mapped = open('/proc/self/maps').read(); "
        "assert 'libbcc' not in mapped and 'libLLVM' not in mapped"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_place_that_is_not_on_bpffs_is_refused_and_left_empty(tmp_path: Path) -> None:
    with pytest.raises(FeatureMissing, match="is not on a BPF file system: mount -t bpf bpf"):
        pins.load(tmp_path / "pins")
    assert list((tmp_path / "pins").iterdir()) == []


def test_second_agent_on_the_same_pins_is_refused(directory: Path) -> None:
    first, second = pins.Pins(directory), pins.Pins(directory)
    first.hold()
    with pytest.raises(PinsInUse, match="--pins"):
        second.hold()
    second.close()
    first.close()
    third = pins.Pins(directory)
    third.hold()
    third.close()

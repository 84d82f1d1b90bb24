"""The pin directory: made by the compiler child, opened by everybody else.

    <root>/<schema hash>/maps/ss_*        every map of bpf/include/maps.h
                        /programs/ss_*    every program
                        /links/ss_*       cgroup links; lookup_<netns cookie>, one for each pod

Pins keep programs and maps alive without the agent. A directory that is truncated or foreign is
refused with AbiMismatch before anything is written to it, and so is a root that holds maps of
another layout: two layouts at once would capture every connection twice.

Programs of another build over the same maps are replaced: compiled against the maps that are there,
and put in place one by one. `ss_meta` says whose programs these are before the first and after the
last step, so whoever comes after a crash in between begins anew, in whichever direction.

An agent also holds by descriptor what it has pinned. So a pin that is deleted, or a bpffs that is
unmounted, takes nothing out of the kernel while the agent lives, and `Pins.restore` and
`Pins.rebuild` pin the same objects again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agent.datapath import libbpf
from agent.datapath.maps import Map
from agent.datapath.source import (
    MAGIC,
    MAPS,
    PROGRAMS,
    RING_BUFFERS,
    program_hash,
    schema_hash,
)
from agent.errors import AbiMismatch, AttachError, FeatureMissing, LoadError, MapError, PinsInUse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.datapath.btf import Value

DEFAULT_ROOT = Path("/sys/fs/bpf/sidestep")
BPF_FS_MAGIC = 0xCAFE4A11  # linux/magic.h
STATFS_BYTES = 256  # more than struct statfs has on any machine
COMPILE_SECONDS = 60
STAGING = "loading"
NOBODY = ""  # whose programs these are while they are replaced


class Pins:
    """An open, verified pin directory."""

    def __init__(self, directory: Path) -> None:
        """Open `directory` and verify every part of it (AbiMismatch names what is wrong)."""
        self.directory = directory
        self._held = -1
        self.maps: dict[str, Map] = {}
        self.links: dict[str, int] = {}  # by name, held by `links` as long as they are wanted
        self._others: dict[str, int] = {}  # by path below the directory
        self._mount_point = next(path for path in directory.parents if path.is_mount())
        try:
            self._verify_names("maps", {*MAPS, *RING_BUFFERS})
            self._verify_names("programs", set(PROGRAMS))
            if not (directory / "links").is_dir():
                raise AbiMismatch(f"{directory}/links is missing")
            for name in MAPS:
                try:
                    self.maps[name] = Map(directory / "maps" / name)
                except MapError as error:
                    raise AbiMismatch(str(error)) from error
                if self.maps[name].facts.name != name:
                    raise AbiMismatch(f"{directory}/maps/{name} is another map")
            self.meta = self.maps["ss_meta"].get({"value": 0}) or {}
            if self.meta.get("magic") != MAGIC:
                raise AbiMismatch(f"{directory} has no mark of Sidestep in ss_meta")
            if self.meta["schema"] != schema_hash().encode().ljust(64, b"\0"):
                raise AbiMismatch(f"{directory} holds maps of another layout")
            self.hold_programs()
        except BaseException:
            self.close()
            raise

    def _verify_names(self, kind: str, expected: set[str]) -> None:
        folder = self.directory / kind
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if found != expected:
            parts = [f"{name} is missing" for name in sorted(expected - found)]
            parts += [f"{name} is not ours" for name in sorted(found - expected)]
            raise AbiMismatch(
                f"{folder} is not a complete pin directory: {', '.join(parts)}; remove "
                f"{self.directory} if no agent uses it"
            )

    def hold_programs(self) -> None:
        """Hold the programs that are pinned now, and what else only has a pin."""
        names = [f"maps/{name}" for name in RING_BUFFERS] + [
            f"programs/{name}" for name in PROGRAMS
        ]
        for name in names:
            fd = libbpf.open_pin(self.directory / name)
            if name in self._others:
                os.close(self._others.pop(name))
            self._others[name] = fd

    @property
    def programs(self) -> str:
        """The hash of the sources that the loaded programs were made from."""
        text = self.meta["programs"]
        assert isinstance(text, bytes)
        return text.rstrip(b"\0").decode()

    def program(self, name: str) -> int:
        """Open a program and return its descriptor, which the caller closes."""
        return libbpf.open_pin(self.directory / "programs" / name)

    def link_path(self, name: str) -> Path:
        """Return where the link `name` is, or would be, pinned."""
        return self.directory / "links" / name

    def hold(self, held: int | None = None) -> None:
        """Keep other agents off the directory until `close`, or the end of the process.

        `held` is the lock that a predecessor has passed on (`lock`); it is ours from here.

        Raises:
            PinsInUse: another one holds it.
        """
        if held is not None:
            self._held = held
            return
        self._held = _open_directory(self.directory)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PinsInUse(
                f"another agent runs on {self.directory}: stop it first, or give this one its own "
                "place with --pins"
            ) from error

    @property
    def lock(self) -> int:
        """The descriptor that holds the directory: whoever gets a copy holds it as well."""
        return self._held

    def refresh(self) -> None:
        """Read again what the pins are, after programs were replaced."""
        self.meta = self.maps["ss_meta"].get({"value": 0}) or {}

    def hold_link(self, name: str, fd: int) -> None:
        """Hold a link until `let_go`; the descriptor is ours from here."""
        self.let_go(name)
        self.links[name] = fd

    def let_go(self, name: str) -> None:
        """Hold a link no more, if it is held: it then ends with its pin."""
        if name in self.links:
            os.close(self.links.pop(name))

    def let_go_links(self) -> None:
        """Hold no link any more: they are another agent's to take away."""
        for name in list(self.links):
            self.let_go(name)

    def inodes(self, part: str) -> dict[str, int]:
        """Return what is pinned in a part of the directory, by name, with the inode of the pin.

        Inodes of bpffs are numbered as they are made, so another pin has another one.
        """
        try:
            with os.scandir(self.directory / part) as there:
                return {entry.name: entry.inode() for entry in there}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def missing(self) -> list[str]:
        """List what is not pinned of the maps and programs, by path below the directory."""
        there = {f"{part}/{name}" for part in ("maps", "programs") for name in self.inodes(part)}
        return [name for name in self._pinned() if name not in there]

    def restore(self, name: str) -> None:
        """Pin a map or program again where it was (AttachError)."""
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        libbpf.pin(self._pinned()[name], path)

    def is_elsewhere(self) -> bool:
        """Whether the held directory is no longer what is found at its path."""
        found, held = _identity(self.directory), os.fstat(self._held)
        return found != (held.st_dev, held.st_ino)

    def rebuild(self) -> None:
        """Pin everything at its path again, after the directory or its bpffs went away there.

        A bpffs that is not mounted any more is mounted, where it was when the pins were opened.

        Raises:
            FeatureMissing: there is none, and it cannot be mounted.
            AttachError: something could not be pinned.
            OSError: the directory cannot be made.
        """
        root = self.directory.parent
        if not _is_bpffs(self._mount_point):
            _mount_bpffs(self._mount_point)
        root.mkdir(parents=True, exist_ok=True)
        staging = root / STAGING
        with _locked(root):
            _empty(staging)
            for part in ("maps", "programs", "links"):
                (staging / part).mkdir()
            for name, fd in self._pinned().items():
                libbpf.pin(fd, staging / name)
            for name, fd in self.links.items():
                libbpf.pin(fd, staging / "links" / name)
            staging.rename(self.directory)
            held = self._held
            self._held = -1
            self.hold()
            os.close(held)

    def _pinned(self) -> dict[str, int]:
        maps = {f"maps/{name}": opened.fd for name, opened in self.maps.items()}
        return maps | self._others

    def lookup_text(self) -> list[int]:
        """Return the lookup program, whoever loaded it (AttachError while it is replaced)."""
        self.refresh()
        before = dict(self.meta)
        length = before["lookup_instructions"]
        assert isinstance(length, int)
        text = [self.maps["ss_lookup_text"].get({"value": index}) for index in range(length)]
        self.refresh()
        if self.programs == NOBODY or self.meta != before:
            raise AttachError(f"the programs of {self.directory} are just being replaced")
        return [int(entry["value"]) for entry in text if entry is not None]

    def close(self) -> None:
        """Give the descriptors back; pins stay."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        self.let_go_links()
        for fd in self._others.values():
            os.close(fd)
        self._others.clear()
        for opened in self.maps.values():
            opened.close()
        self.maps.clear()


def _open_directory(directory: Path) -> int:
    # bpffs holds no regular file; the directory itself can be locked.
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    fd = _open_directory(root)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_held(directory: Path) -> bool:
    """Whether an agent runs on a pin directory."""
    fd = _open_directory(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _is_bpffs(path: Path) -> bool:
    # Python's statvfs() does not tell the type, which is the first field of statfs(2)'s answer.
    answer = ctypes.create_string_buffer(STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), answer) != 0:
        raise FeatureMissing(f"{path} cannot be asked: {os.strerror(ctypes.get_errno())}")
    return ctypes.c_long.from_buffer(answer).value == BPF_FS_MAGIC


def _mount_bpffs(place: Path) -> None:
    if ctypes.CDLL(None, use_errno=True).mount(b"bpf", os.fsencode(place), b"bpf", 0, None) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise FeatureMissing(f"bpffs cannot be mounted: {reason}: mount -t bpf bpf {place}")


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        found = directory.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def load(root: Path = DEFAULT_ROOT) -> Pins:
    """Open the pins under `root`, compiling and loading first what is not there.

    Raises:
        FeatureMissing: `root` is not on a BPF file system, or root's rights are missing.
        LoadError: the sources do not compile, or the verifier refuses a program.
        AbiMismatch: there are pins, and not of this layout.
    """
    if os.geteuid() != 0:
        raise FeatureMissing("root is missing: loading BPF programs needs it")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FeatureMissing(f"{root} cannot be made, is bpffs mounted? {error}") from error
    if not _is_bpffs(root):
        raise FeatureMissing(
            f"{root} is not on a BPF file system: mount -t bpf bpf {DEFAULT_ROOT.parent}"
        )
    directory = root / schema_hash()
    with _locked(root):
        for other in root.iterdir():
            if other not in (directory, root / STAGING):
                raise AbiMismatch(
                    f"{other} holds maps of another version, whose layout this one "
                    f"({directory.name}) cannot take over: run `sidestep uninstall --pins {root}` "
                    "when the pods of this node can do without the mesh, then start it again"
                )
        if not directory.exists():
            _make(root / STAGING, directory)
        pins = Pins(directory)
        if pins.programs != program_hash():
            try:
                _replace_programs(root / STAGING, pins)
            except BaseException:
                pins.close()
                raise
    return pins


def _empty(staging: Path) -> None:
    if staging.exists():  # of a child that was killed; we hold the lock
        shutil.rmtree(staging)
    staging.mkdir()


def _compile(staging: Path, maps: Path | None = None) -> list[int]:
    """Load into an empty staging directory; return the text of lookup.c."""
    _empty(staging)
    command = [sys.executable, "-m", "agent.datapath.compiler", str(staging)]
    if maps is not None:
        command.append(str(maps))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
    )
    if done.returncode != 0:
        raise LoadError(f"the BPF programs were not loaded: {done.stderr.strip()[-2000:]}")
    # Before it, the compiler may have said something of its own.
    text: list[int] = json.loads(done.stdout.splitlines()[-1])
    return text


def _make(staging: Path, directory: Path) -> None:
    try:
        text = _compile(staging)
        with contextlib.closing(Map(staging / "maps/ss_lookup_text")) as lookup_text:
            _write_text(lookup_text, text)
        with contextlib.closing(Map(staging / "maps/ss_meta")) as meta:
            _write_meta(meta, program_hash(), len(text))
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _replace_programs(staging: Path, pins: Pins) -> None:
    """Put our programs in the place of another build's; links follow when they are attached."""
    try:
        text = _compile(staging, pins.directory / "maps")
        length = pins.meta["lookup_instructions"]
        assert isinstance(length, int)
        _write_meta(pins.maps["ss_meta"], NOBODY, length)
        for name in PROGRAMS:
            (staging / "programs" / name).rename(pins.directory / "programs" / name)
        _write_text(pins.maps["ss_lookup_text"], text)
        _write_meta(pins.maps["ss_meta"], program_hash(), len(text))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    pins.refresh()
    pins.hold_programs()


def _write_text(lookup_text: Map, text: list[int]) -> None:
    for index, instruction in enumerate(text):
        lookup_text.put({"value": index}, {"value": instruction})


def _write_meta(meta: Map, programs: str, lookup_instructions: int) -> None:
    value: dict[str, Value] = {
        "magic": MAGIC,
        "schema": schema_hash().encode(),
        "programs": programs.encode(),
        "lookup_instructions": lookup_instructions,
    }
    meta.put({"value": 0}, value)


def remove(directory: Path) -> None:
    """Remove a pin directory: programs detach and maps go with their last user."""
    # Links first: with a map gone a program could only refuse.
    for part in ("links", "programs", "maps"):
        shutil.rmtree(directory / part, ignore_errors=True)
    directory.rmdir()

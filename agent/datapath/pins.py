"""The pin directory: made by the compiler child, opened by everybody else.

    <root>/<schema hash>/maps/ss_*        every map of bpf/include/maps.h
                        /programs/ss_*    every program
                        /links/ss_*       cgroup links; lookup_<netns cookie>, one for each pod

Pins keep programs and maps alive without the agent. A directory that is truncated, foreign, or made
by other sources is refused with AbiMismatch before anything is written to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
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
from agent.errors import AbiMismatch, FeatureMissing, LoadError, MapError, PinsInUse

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_ROOT = Path("/sys/fs/bpf/sidestep")
BPF_FS_MAGIC = 0xCAFE4A11  # linux/magic.h
STATFS_BYTES = 256  # more than struct statfs has on any machine
COMPILE_SECONDS = 60


class Pins:
    """An open, verified pin directory."""

    def __init__(self, directory: Path) -> None:
        """Open `directory` and verify every part of it (AbiMismatch names what is wrong)."""
        self.directory = directory
        self._held = -1
        self.maps: dict[str, Map] = {}
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

    def hold(self) -> None:
        """Keep other agents off the directory until `close`, or the end of the process.

        Raises:
            PinsInUse: another one holds it.
        """
        self._held = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PinsInUse(
                f"another agent runs on {self.directory}: stop it first, or give this one its own "
                "place with --pins"
            ) from error

    def close(self) -> None:
        """Give the descriptors back; pins stay."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        for opened in self.maps.values():
            opened.close()
        self.maps.clear()


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    # bpffs holds no regular file; the directory itself can be locked.
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _is_bpffs(path: Path) -> bool:
    # Python's statvfs() does not tell the type, which is the first field of statfs(2)'s answer.
    answer = ctypes.create_string_buffer(STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), answer) != 0:
        raise FeatureMissing(f"{path} cannot be asked: {os.strerror(ctypes.get_errno())}")
    return ctypes.c_long.from_buffer(answer).value == BPF_FS_MAGIC


def load(root: Path = DEFAULT_ROOT) -> Pins:
    """Open the pins under `root`, compiling and loading first where there are none.

    Raises:
        FeatureMissing: `root` is not on a BPF file system, or root's rights are missing.
        LoadError: the sources do not compile, or the verifier refuses a program.
        AbiMismatch: there is a directory, and it is not one that these sources made.
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
        if not directory.exists():
            _compile(root / "loading", directory)
        pins = Pins(directory)
    if pins.programs != program_hash():
        pins.close()
        raise AbiMismatch(
            f"{directory} holds programs of another build ({pins.programs}): take that agent "
            "down and remove its pins first"
        )
    return pins


def _compile(staging: Path, directory: Path) -> None:
    if staging.exists():  # of a child that was killed; we hold the lock
        shutil.rmtree(staging)
    staging.mkdir()
    command = [sys.executable, "-m", "agent.datapath.compiler", str(staging)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
        if done.returncode != 0:
            raise LoadError(f"the BPF programs were not loaded: {done.stderr.strip()[-2000:]}")
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def is_held(directory: Path) -> bool:
    """Say whether an agent runs on these pins."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def remove(directory: Path) -> None:
    """Remove a pin directory: programs detach and maps go with their last user."""
    # Links first: with a map gone a program could only refuse.
    for part in ("links", "programs", "maps"):
        shutil.rmtree(directory / part, ignore_errors=True)
    directory.rmdir()

"""Another wall clock for some processes: `clock.c`, and the offset that it reads."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING

from tests.support.modules import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = ROOT / "tests/support/clock.c"
FLAGS = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")


def build_shim(directory: Path) -> Path:
    """Compile the shim; returns what to preload."""
    shim = directory / "clock.so"
    subprocess.run(["gcc", *FLAGS, "-o", str(shim), str(SOURCE)], check=True)
    return shim


class Clock:
    """The wall clock of the processes that are started with `environment`."""

    def __init__(self, shim: Path, path: Path) -> None:
        """Keep the offset in the file `path`; the clock is right at first."""
        self._path = path
        path.write_bytes(struct.pack("q", 0))
        self.environment = {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(path)}

    def set_ahead(self, seconds: float) -> None:
        """Make it jump; 0 is right, less is behind."""
        with self._path.open("r+b", buffering=0) as file:  # in place: it is mapped
            file.write(struct.pack("q", int(seconds * 1e9)))

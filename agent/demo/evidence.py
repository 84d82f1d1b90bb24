"""Facts of the machine that the demo compares: filters, processes, access logs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.errors import LabError
from cni.inotify import CONTENTS, DirectoryWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# What each tool shows of a network namespace, for both families.
FILTERS = {
    "iptables": (("iptables-save",), ("ip6tables-save",)),
    "nftables": (("nft", "list", "ruleset"),),
    "conntrack": (("conntrack", "-L"), ("conntrack", "-L", "-f", "ipv6")),
}
LOG_SECONDS = 5.0
START_TIME_FIELD = 22  # of /proc/PID/stat, proc(5)

Rules = dict[str, str]


def read_filters(namespaces: Iterable[Path]) -> dict[str, Rules]:
    """Return what each of FILTERS shows in each namespace (LabError if one cannot be asked)."""
    places = list(namespaces)
    return {
        name: {
            str(place): "".join(_ask(place, command) for command in commands) for place in places
        }
        for name, commands in FILTERS.items()
    }


def _ask(place: Path, command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            ["nsenter", f"--net={place}", *command], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        raise LabError(f"{' '.join(command)} failed in {place}: {detail}") from error
    # iptables-save writes the date into comments
    return "".join(line for line in done.stdout.splitlines(True) if not line.startswith("#"))


def process_starts(pids: Iterable[int]) -> dict[int, int]:
    """Return when each process that lives started, in clock ticks since boot."""
    starts = {}
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The second field, the name, may contain spaces.
        starts[pid] = int(stat.rpartition(")")[2].split()[START_TIME_FIELD - 3])
    return starts


@dataclass
class AccessLog:
    """An agent's log, read from where it is now."""

    path: Path

    def __post_init__(self) -> None:
        self._offset = self.path.stat().st_size

    def wait_for(
        self, matches: Callable[[dict[str, Any]], bool], message: str = "connection complete"
    ) -> dict[str, Any]:
        """Return the first entry from now on that `matches`, a connection if nothing else is said.

        Raises:
            LabError: none comes.
        """
        deadline = time.monotonic() + LOG_SECONDS
        with contextlib.closing(DirectoryWatch(self.path.parent, events=CONTENTS)) as changes:
            # By the clock: in a directory where others write all the time there is always a change.
            while (left := deadline - time.monotonic()) > 0:
                for entry in self._read():
                    if entry.get("message") == message and matches(entry):
                        return entry
                changes.wait(left)
        raise LabError(f"{self.path} does not tell of the connection, or not that {message!r}")

    def _read(self) -> list[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]

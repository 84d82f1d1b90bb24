"""A process with keys leaves no core file, though its limits would allow one."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIMIT = 1 << 20
CODE = """
import ctypes, resource, sys
from agent.secrecy import keep_memory_private
if sys.argv[1] == "private":
    keep_memory_private()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE), flush=True)
ctypes.string_at(0)
"""


def crash(how: str, tmp_path: Path) -> tuple[int, str]:
    def allow() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (LIMIT, LIMIT))

    done = subprocess.run(
        [sys.executable, "-c", CODE, how], cwd=tmp_path, preexec_fn=allow,  # one thread
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return done.returncode, done.stdout.strip()


def test_private_process_is_undumpable_and_has_no_room_for_a_core(tmp_path: Path) -> None:
    assert crash("private", tmp_path) == (-signal.SIGSEGV, "0 0 0")
    assert list(tmp_path.iterdir()) == []


def test_other_process_would_be_dumped(tmp_path: Path) -> None:
    """Else the test above proved nothing."""
    assert crash("plain", tmp_path) == (-signal.SIGSEGV, f"1 {LIMIT} {LIMIT}")

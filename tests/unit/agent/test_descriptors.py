"""A process takes all descriptors that it may have."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = (
    "import resource; from agent.descriptors import allow_all;"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256));"
    "allow_all(); print(resource.getrlimit(resource.RLIMIT_NOFILE))"
)


def test_the_soft_limit_becomes_the_hard_one() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    assert done.stdout.decode().strip() == "(256, 256)"

"""The limit of open files, of processes of the test's own."""

from __future__ import annotations

import resource
import subprocess
import sys

CODE = """
import os, resource
from agent.descriptors import raise_limit
found = raise_limit()
held = [os.dup(0) for _ in range(200)]
print(found, *resource.getrlimit(resource.RLIMIT_NOFILE), max(held) > 200)
"""


def test_process_may_open_as_many_as_the_hard_limit_says() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))

    done = subprocess.run(
        [sys.executable, "-c", CODE], preexec_fn=lower,  # one thread
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert done.stdout.split() == ["300", "300", "300", "True"]

"""What each process loads: a worker only what moves bytes, a command only what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

# The libraries of the control side and of the command line.
HEAVY = {
    "asyncio", "bcc", "click", "cryptography", "grpc", "kubernetes", "pyroute2", "rich",
    "yaml",
}  # fmt: skip
START_SECONDS = 0.5


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after `statement`."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return {name.split(".")[0] for name in json.loads(done.stdout)}


def test_worker_loads_nothing_of_the_control_side() -> None:
    assert loaded_by("import agent.worker") & HEAVY == set()


def test_command_line_loads_no_command_before_it_is_asked_for() -> None:
    assert loaded_by("import agent.cli") & HEAVY == {"click"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        ("agent", {"bcc", "grpc", "kubernetes", "rich"}),
        ("check", {"asyncio", "bcc", "cryptography", "kubernetes", "pyroute2"}),
        ("maps", {"asyncio", "bcc", "cryptography", "kubernetes", "pyroute2"}),
        ("programs", {"asyncio", "bcc", "cryptography", "kubernetes", "pyroute2"}),
        ("lab", {"bcc", "kubernetes"}),
    ],
)
def test_command_loads_only_what_it_needs(command: str, unneeded: set[str]) -> None:
    assert loaded_by(f"import agent.commands.{command}") & unneeded == set()


def test_command_line_starts_at_once() -> None:
    took = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "agent.cli", "check", "--help"], check=True,
                       capture_output=True)  # fmt: skip
        took.append(time.monotonic() - began)
    assert min(took) < START_SECONDS


def test_netlink_brings_no_other_protocol_of_its_library() -> None:
    program = (
        "import json, sys, agent.netlink;"
        " print(json.dumps([name for name in sys.modules if name.startswith('pyroute2')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    loaded = set(json.loads(done.stdout))
    assert "pyroute2.iproute.linux" in loaded
    assert not loaded & {"pyroute2", "pyroute2.ndb.main", "pyroute2.conntrack", "pyroute2.ipset"}

"""The demo as a user starts it: every claim holds, and one that does not is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from agent.demo.screen import SilentScreen
from agent.demo.story import Story
from agent.errors import LabError
from agent.lab.lab import DEFAULT_CLUSTER, Lab

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root
DEMO = [sys.executable, "-m", "agent.cli", "demo"]
SECONDS = 20


def test_every_claim_holds_within_twenty_seconds() -> None:
    began = time.monotonic()
    done = subprocess.run([*DEMO, "-o", "json"], capture_output=True, text=True, check=False)
    assert time.monotonic() - began < SECONDS
    claims = json.loads(done.stdout)["claims"]
    assert [name for name, holds in claims.items() if not holds] == []
    assert len(claims) == 24
    assert done.returncode == 0, done.stderr


def test_text_without_a_terminal_has_no_colors() -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "24 of 24 claims hold" in done.stdout
    assert "\x1b" not in done.stdout


def test_traffic_that_bypasses_the_tunnel_is_told(tmp_path: Path) -> None:
    """Both pods exclude the port: the label changes nothing, and the demo must not say it did."""
    objects = list(yaml.safe_load_all(DEFAULT_CLUSTER.read_text()))
    for body in objects:
        if body["kind"] == "Pod":
            body["metadata"]["annotations"] = {
                "traffic.sidecar.istio.io/excludeOutboundPorts": "8080",
                "traffic.sidecar.istio.io/excludeInboundPorts": "8080",
            }
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump_all(objects))
    with pytest.raises(LabError, match="does not tell of the connection"):
        Story(Lab("excluded"), SilentScreen(), cluster).tell()
    assert not Lab("excluded").run.exists()


def test_second_demo_at_once_is_refused() -> None:
    with subprocess.Popen([*DEMO], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline()  # its first stage has begun
        second = subprocess.run(DEMO, capture_output=True, text=True, check=False)
        first.stdout.read()
    assert first.returncode == 0
    assert second.returncode == 2
    assert second.stderr == "error: another demo runs on this machine: wait until it has ended\n"

"""The demo as a user starts it: every claim holds, and one that does not is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from agent.demo.screen import SilentScreen, TerminalScreen
from agent.demo.story import Story
from agent.errors import LabError
from agent.lab import machine
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
    assert "curl: curl:" not in done.stdout
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


NEIGHBORS = """
kind: Namespace
metadata: {name: outside}
---
kind: Pod
metadata: {name: sink, namespace: outside}
spec:
  nodeName: west
  containers: [{command: [python3, -m, http.server, "8080"]}]
---
kind: Pod
metadata: {name: source, namespace: outside}
spec:
  nodeName: east
  containers:
    - command: [bash, -c, "while sleep 0.002; do echo x >/dev/tcp/10.244.2.5/8080; done 2>&-"]
"""


def test_another_port_on_the_link_is_told(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"{DEFAULT_CLUSTER.read_text()}---{NEIGHBORS}")
    report = Story(Lab("beside"), SilentScreen(), cluster).tell()
    assert {"only_the_tunnel_port", "only_tls_records"} == {
        name for name, holds in report.claims.items() if not holds
    }
    # What is shown is the tunnel all the same.
    assert report.evidence["tls"].startswith("TLS 1.3")


class Careless(Lab):
    """A lab that leaves one namespace of its own; one of another has come meanwhile."""

    def down(self) -> bool:
        found = super().down()
        for name in ("ss-careless-fabric", "ss-careless-b-fabric") if found else ():
            machine.add_namespace(name)
        return found


def test_what_the_demo_leaves_is_told_and_another_lab_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = machine.NETNS_DIRECTORY / "ss-careless-fabric"
    try:
        report = Story(Careless("careless"), TerminalScreen()).tell()
    finally:
        for path in machine.NETNS_DIRECTORY.glob("ss-careless*"):
            machine.delete_namespace(path)
    assert [name for name, holds in report.claims.items() if not holds] == ["nothing_left_behind"]
    assert f"left on this machine: {left}\n" in capsys.readouterr().out


def test_second_demo_at_once_is_refused() -> None:
    with subprocess.Popen([*DEMO], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        first.stdout.readline()  # its first stage has begun
        second = subprocess.run(DEMO, capture_output=True, text=True, check=False)
        first.stdout.read()
    assert first.returncode == 0
    assert second.returncode == 2
    assert second.stderr == "error: another demo runs on this machine: wait until it has ended\n"

"""The agent works with the capabilities that the chart gives it, and with one less it does not."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from agent.errors import LabError
from agent.lab import lab as labs
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root

SHOP = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}},
}
# Instead of `features.require`, which would say what the kernel is to say.
NO_CHECK = "from agent.datapath import features\nfeatures.require = lambda: None\n"


def given_capabilities() -> list[str]:
    for body in yaml.safe_load_all((ROOT / "deploy/manifests/sidestep.yaml").read_text()):
        if body and body["kind"] == "DaemonSet":
            for container in body["spec"]["template"]["spec"]["containers"]:
                if container["name"] == "agent":
                    return list(container["securityContext"]["capabilities"]["add"])
    raise AssertionError("the manifests have no agent")


GIVEN = given_capabilities()


def run_agents(capabilities: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a lab whose agents have `capabilities`; return why it does not work, or ""."""
    (directory / "sitecustomize.py").write_text(NO_CHECK)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{directory}")
    lab = Lab(f"deploy{os.getpid()}")
    try:
        with monkeypatch.context() as patched:
            capped = ["-m", "tests.support.capped", ",".join(capabilities), "agent"]
            patched.setattr(labs, "AGENT", capped)
            lab.up(DEFAULT_CLUSTER, print)
        lab.write_object(SHOP)
        if why := wait_for_pods(lab):
            return why
        client = lab.find_pod("client")
        for server in ("server", "cache"):  # through the tunnel, and on one node
            url = f"http://{lab.find_pod(server).address4}:8080/BSD"
            curl = ["curl", "-s", "-m", "5", "-o", "/dev/null", url]
            for _ in range(2):
                code = subprocess.run(lab.command_in(client, curl), check=False).returncode
                if code:
                    return f"curl to {server} ends with {code}"
    except LabError as error:
        return str(error)
    finally:
        lab.down()
    return ""


def wait_for_pods(lab: Lab) -> str:
    """Wait until all pods are enrolled, or say how they are after some time."""
    until = time.monotonic() + 10
    while True:
        rows = [
            row
            for node in lab.cluster().nodes
            for row in next(lab.agent_states(node, "state"))["pods"]
        ]
        if [row["state"] for row in rows] == ["enrolled"] * 3:
            return ""
        if time.monotonic() > until:
            return "; ".join(f"{row['name']} is {row['state']}: {row['detail']}" for row in rows)
        time.sleep(0.05)


def test_agent_works_with_what_the_chart_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_agents(GIVEN, tmp_path, monkeypatch) == ""


@pytest.mark.parametrize("missing", GIVEN)
def test_agent_does_not_work_with_less(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = run_agents([name for name in GIVEN if name != missing], tmp_path, monkeypatch)
    print(why)  # noqa: T201  # what docs/install.md says of it
    assert why != ""

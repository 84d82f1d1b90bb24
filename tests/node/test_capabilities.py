"""Agent and installer work with the capabilities that the chart gives, and with one less do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from agent.errors import LabError
from agent.lab import lab as labs
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from cni.conflist import PLUGIN_TYPE
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


def given_capabilities(manifest: str, name: str) -> list[str]:
    for body in yaml.safe_load_all((ROOT / "deploy/manifests" / manifest).read_text()):
        if body and body["kind"] == "DaemonSet":
            spec = body["spec"]["template"]["spec"]
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                if container["name"] == name:
                    return list(container["securityContext"]["capabilities"].get("add", ()))
    raise AssertionError(f"{manifest} has no container {name}")


GIVEN = given_capabilities("sidestep.yaml", "agent")
GIVEN_INSTALLER = given_capabilities("sidestep.yaml", "cni")
GIVEN_UNINSTALLER = given_capabilities("uninstall.yaml", "cni")
SOMEBODY = 1000
CONFLIST = '{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}'


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


def run_installer(capabilities: list[str], command: str, top: Path) -> str:
    """Run `sidestep cni` on a node's directories; return why it does not work, or ""."""
    places = [f"--networks={top / 'net.d'}", f"--plugins={top / 'bin'}", f"--state={top / 'state'}"]
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.support.capped", ",".join(capabilities),
            "cni", command, *places,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


@pytest.fixture
def of_somebody(tmp_path: Path) -> Path:
    """Return where directories and a network are that are not root's."""
    network = tmp_path / "net.d/10-pods.conflist"
    for directory in (network.parent, tmp_path / "bin"):
        directory.mkdir(mode=0o755)
    network.write_text(CONFLIST)
    network.chmod(0o600)
    for path in (network, network.parent, tmp_path / "bin"):
        os.chown(path, SOMEBODY, SOMEBODY)
    return tmp_path


def test_installers_work_where_directories_and_files_are_not_roots(of_somebody: Path) -> None:
    network = of_somebody / "net.d/10-pods.conflist"
    for capabilities, command in ((GIVEN_INSTALLER, "install"), (GIVEN_UNINSTALLER, "uninstall")):
        assert run_installer(capabilities, command, of_somebody) == ""
        assert (network.stat().st_uid, network.stat().st_gid) == (SOMEBODY, SOMEBODY)
        assert network.stat().st_mode & 0o777 == 0o600
        assert (PLUGIN_TYPE in network.read_text()) == (command == "install")
    assert network.read_text() == CONFLIST


@pytest.mark.parametrize("missing", GIVEN_INSTALLER)
def test_installer_does_not_work_with_less(of_somebody: Path, missing: str) -> None:
    less = [name for name in GIVEN_INSTALLER if name != missing]
    why = run_installer(less, "install", of_somebody)
    print(why)  # noqa: T201  # what docs/install.md says of it
    assert "not permitted" in why or "denied" in why

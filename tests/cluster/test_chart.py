"""The chart: its plain rendering is up to date, and a real API server takes all of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.modules import ROOT

if TYPE_CHECKING:
    from tests.support.api_server import ApiServer

CHART = ROOT / "deploy/chart"
MANIFESTS = ROOT / "deploy/manifests"
NAMES = ("sidestep.yaml", "uninstall.yaml")
# Every branch of the templates.
EVERYTHING = {
    "image": {"tag": "1", "pullSecrets": ["registry"]},
    "trustDomainAliases": ["old.local"],
    "enrollment": {
        "selectors": [{"podSelector": {"matchLabels": {"mesh": "yes"}}}],
        "excludedNamespaces": ["kube-system", "monitoring"],
    },
    "agent": {
        "workers": 2,
        "directPath": False,
        "maxSurge": "10%",
        "exclude": {
            "outboundPorts": [25],
            "outboundNetworks": ["192.0.2.0/24", "fd00::"],
            "inboundPorts": [9000],
        },
        "kubeletCgroup": "/sys/fs/cgroup/kubelet",
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"a": "b"},
    },
    "ca": {
        "replicas": 2,
        "clusterIP": "10.96.0.13",
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "podAnnotations": {"a": "b"},
    },
    "networkPolicy": {"enabled": True},
    "podMonitor": {"enabled": True, "labels": {"team": "net"}},
    "createNamespace": True,
}


def render(programs: Path, directory: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    given = directory / "values.json"
    given.write_text(json.dumps(values))
    command = [str(programs / "helm"), "template", "sidestep", str(CHART), "-n", "mesh"]
    done = subprocess.run([*command, "-f", str(given)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [body for body in yaml.safe_load_all(done.stdout) if body]


def apply(server: ApiServer, directory: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Apply on the server's side, which refuses fields that it does not know."""
    config = directory / "kubeconfig"
    config.write_text(json.dumps(server.kubeconfig()))
    kubectl = [str(Path(sys.executable).parent / "kubectl"), f"--kubeconfig={config}"]
    return subprocess.run(
        # Roles of the cluster may be other tests' by now.
        [*kubectl, "apply", "--server-side", "--force-conflicts", "--validate=strict", "-f", "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_manifests_are_the_charts(programs: Path, tmp_path: Path) -> None:
    script = str(ROOT / "scripts/render_manifests.sh")
    subprocess.run([script, str(programs / "helm"), str(tmp_path)], check=True)
    for name in NAMES:
        found, rendered = (MANIFESTS / name).read_text(), (tmp_path / name).read_text()
        assert found == rendered, "run `make manifests`"


@pytest.mark.parametrize("name", NAMES)
def test_api_server_takes_the_manifests(api_server: ApiServer, tmp_path: Path, name: str) -> None:
    text = (MANIFESTS / name).read_text()
    done = apply(api_server, tmp_path, text)
    assert done.returncode == 0, done.stderr
    applied = done.stdout.count("serverside-applied")
    assert applied == sum(1 for body in yaml.safe_load_all(text) if body)


def test_api_server_takes_every_part_of_the_chart(
    api_server: ApiServer, programs: Path, tmp_path: Path
) -> None:
    bodies = render(programs, tmp_path, EVERYTHING)
    # Its kind is Prometheus' operator's, which is not here.
    known = [body for body in bodies if body["kind"] != "PodMonitor"]
    assert len(known) == len(bodies) - 1
    done = apply(api_server, tmp_path, yaml.safe_dump_all(known))
    assert done.returncode == 0, done.stderr


def test_misspelled_field_would_be_refused(api_server: ApiServer, tmp_path: Path) -> None:
    text = (MANIFESTS / "sidestep.yaml").read_text()
    done = apply(api_server, tmp_path, text.replace("hostPID:", "hostPid:"))
    assert done.returncode != 0
    assert "spec.template.spec.hostPid: field not declared" in done.stderr


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"agnet": {}}, "additional properties 'agnet' not allowed"),
        ({"agent": {"workers": 99}}, "at '/agent/workers': maximum: got 99, want 64"),
        ({"ca": {"longest": "1d"}}, "at '/ca/longest': got string, want integer"),
        ({"agent": {"metricsPort": 15000}}, "agent.metricsPort and agent.adminPort have to differ"),
    ],
)
def test_values_that_are_wrong_are_refused(
    programs: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    given = tmp_path / "values.json"
    given.write_text(json.dumps(values))
    done = subprocess.run(
        [programs / "helm", "template", "sidestep", CHART, "-f", given],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert told in done.stderr


def test_node_that_agents_leave_alone_is_cleaned_too(programs: Path, tmp_path: Path) -> None:
    few = {"nodeSelector": {"mesh": "yes"}, "tolerations": [], "affinity": {"nodeAffinity": {}}}
    pods = {
        body["metadata"]["name"]: body["spec"]["template"]["spec"]
        for body in render(programs, tmp_path, {"agent": few, "cni": {"enabled": False}})
        if body["kind"] == "DaemonSet"
    }
    assert pods["sidestep-agent"]["nodeSelector"]["mesh"] == "yes"
    cleaner = pods["sidestep-uninstall"]
    assert cleaner["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert cleaner["tolerations"] == [{"operator": "Exists"}]
    assert "affinity" not in cleaner
    # Also of a plugin that was turned off since.
    assert [each["name"] for each in cleaner["initContainers"]] == ["cni", "node"]
    # Nor does a pod wait for what is missing on a node that never had an agent.
    kinds = {each["name"]: each["hostPath"]["type"] for each in cleaner["volumes"]}
    assert kinds["networks"] == kinds["plugins"] == "DirectoryOrCreate"


def test_jobs_of_an_uninstallation_are_not_put_on_a_node_that_is_away(
    programs: Path, tmp_path: Path
) -> None:
    bodies = render(programs, tmp_path, {})
    jobs = [body["spec"]["template"]["spec"] for body in bodies if body["kind"] == "Job"]
    assert len(jobs) == 2
    assert all("tolerations" not in job for job in jobs)


def test_commands_have_every_option_that_the_chart_gives(programs: Path, tmp_path: Path) -> None:
    seen = set()
    for body in render(programs, tmp_path, EVERYTHING):
        template = body.get("spec", {}).get("template")
        if template is None:
            continue
        pod = template["spec"]
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            words = container.get("args", [])
            names = [word for word in words if not word.startswith("-")]
            if not names:
                continue
            command: Any = importlib.import_module(f"agent.commands.{names[0]}")
            command = getattr(command, names[0])
            for name in names[1:]:
                command = command.commands[name]
            known = {
                option
                for parameter in command.params
                for option in (*parameter.opts, *parameter.secondary_opts)
            }
            options = {word.partition("=")[0] for word in words} - set(names)
            assert options <= known
            seen.add(" ".join(names))
    assert seen == {"agent", "ca", "cni watch", "cni uninstall", "uninstall", "wait"}

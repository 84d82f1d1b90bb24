"""`sidestep maps`, `programs` and `check`, for a user whose agents are alive or dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from agent.datapath.source import MAPS, PROGRAMS, RING_BUFFERS
from agent.lab import machine
from agent.lab.lab import DEFAULT_CLUSTER, Lab
from agent.question import ask
from tests.support.labs import PodEnd, is_alive
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.lab.cluster import LabNode

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    built = Lab(f"o{os.getpid()}")
    try:
        built.up(DEFAULT_CLUSTER, print)
        built.label_namespace("shop", "ambient")
        yield built
    finally:
        built.down()


@pytest.fixture(scope="module")
def dead(lab: Lab) -> Lab:
    """The same lab, whose agents have been killed: the pins are all that is left."""
    for node in lab.cluster().nodes:
        kill_agent(lab, node)
    return lab


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def rows(lab: Lab, *words: str) -> list[dict[str, Any]]:
    """Return what a command prints as JSON, having seen that YAML and the table say the same."""
    words = (*words, "--pins", str(lab.pins))
    as_json, as_yaml, table = (run(*words, "-o", kind) for kind in ("json", "yaml", "table"))
    for done in (as_json, as_yaml, table):
        assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(as_json.stdout)
    assert yaml.safe_load(as_yaml.stdout) == found
    assert len(table.stdout.splitlines()) == 1 + len(found)  # the heading
    return found


def test_flow_of_an_open_connection_is_told_with_its_pod(lab: Lab) -> None:
    with ExitStack() as stack:
        PodEnd(lab, "server", stack).echo(9000)
        assert is_alive(PodEnd(lab, "client", stack).connect("10.244.2.3", 9000))
        found = rows(lab, "maps", "dump", "ss_origin_flow")
    (flow,) = [row for row in found if row["destination_port"] == 9000]
    assert (flow["pod"], flow["destination"]) == ("shop/client", "10.244.2.3")


def test_changes_of_a_map_are_shown_until_somebody_interrupts(lab: Lab) -> None:
    command = [sys.executable, "-m", "agent.cli", "maps", "dump", "ss_origin_flow", "--watch"]
    command += ["--pod", "shop/client", "-o", "json", "--pins", str(lab.pins)]
    with ExitStack() as stack:
        PodEnd(lab, "server", stack).echo(9001)
        client = PodEnd(lab, "client", stack)
        # A shell gives what it starts in the background SIGINT ignored, and so would we.
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watching = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        assert watching.stdout is not None
        assert watching.stderr is not None

        def wait_for(change: str) -> None:
            for line in watching.stdout or ():
                found = json.loads(line)
                if (found["change"], found["entry"]["destination_port"]) == (change, 9001):
                    return
            raise AssertionError(f"the entry was not {change}")

        with client.connect("10.244.2.3", 9001) as connection:
            assert is_alive(connection)
            wait_for("added")
        wait_for("removed")
        watching.send_signal(signal.SIGINT)
        assert (watching.wait(5), watching.stderr.read()) == (0, "")


LISTINGS = (
    "diff", "pods", "connections", "policies", "certs", "workloads", "services", "programs",
    "maps list", "maps dump ss_pods",
)  # fmt: skip


@pytest.mark.parametrize("listing", LISTINGS)
def test_mistyped_name_is_an_error_and_one_without_rows_is_none(lab: Lab, listing: str) -> None:
    command = (*listing.split(), "--lab", lab.name)
    for wanted, said in (
        (("--pod", "nope"), "no pod nope is known"),
        (("-n", "nope"), "no namespace nope is known"),
        (("--node", "nope"), "no node nope is known; closest: "),
    ):
        done = run(*command, *wanted)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {said}")
    with outsiders(lab):
        for known in ("--pod=vault", "--pod=bank/vault", "-nbank"):
            done = run(*command, known)
            assert done.returncode == 0, done.stderr


@contextmanager
def outsiders(lab: Lab, **labels: str) -> Iterator[None]:
    """Have a pod without a process, in a namespace that is not in the mesh."""
    vault = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "vault", "namespace": "bank", "uid": "vault", "labels": labels},
        "spec": {"nodeName": "east"},
        "status": {"podIPs": [{"ip": "10.244.1.99"}]},
    }
    lab.write_object(vault)
    try:
        wait_until(lambda: "bank/vault" in known_pods(lab))
        yield
    finally:
        lab.remove_object(vault)
        wait_until(lambda: "bank/vault" not in known_pods(lab))


def known_pods(lab: Lab) -> set[str]:
    """Return the pods that each agent of the lab knows."""
    answers = [ask(lab.admin_socket(node), "names") for node in lab.cluster().nodes]
    return set.intersection(*({pod["pod"] for pod in each["pods"]} for each in answers))


def test_pod_that_does_not_want_the_mesh_is_told_why(lab: Lab) -> None:
    with outsiders(lab):
        done = run("diff", "--pod", "bank/vault", "--lab", lab.name)
        assert (done.returncode, done.stdout.splitlines()[1:]) == (
            0, ["bank/vault is not in the mesh: neither its label istio.io/dataplane-mode nor that "
                "of its namespace says ambient"],
        )  # fmt: skip
        assert run("diff", "--pod", "client", "--lab", lab.name).stdout.count("\n") == 1


def test_what_cannot_be_mended_is_not_told_twice(lab: Lab) -> None:
    with outsiders(lab, **{"istio.io/dataplane-mode": "ambient"}):
        done = run("check", "--repair", "--lab", lab.name, "-o", "json")
        (row,) = json.loads(done.stdout)
        assert (done.returncode, row["problem"]) == (1, "it is so again")
        assert row["found"].startswith("pending: bank/vault has no process")
        # Its label is set, so that is not what is missing.
        done = run("explain", "client", "bank/vault:80", "--lab", lab.name, "-o", "json")
        (row,) = json.loads(done.stdout)
        assert "pending: bank/vault has no process" in row["reason"]
        assert row["to_change"] == []


def test_listings_without_rows_say_so_and_are_sorted(lab: Lab) -> None:
    done = run("connections", "--lab", lab.name)
    assert done.stdout.startswith("NODE   DIRECTION")
    assert done.stderr == "no connections\n"
    for listing, column in (("pods", 1), ("workloads", 0), ("certs", 1)):
        shown = run(listing, "--lab", lab.name).stdout.splitlines()[1:]
        named = [line.split()[column].rpartition("/")[2] for line in shown]
        assert named == ["cache", "client", "server"]


def test_certificate_of_a_pod_is_that_of_its_identity(lab: Lab) -> None:
    done = run("certs", "--pod", "shop/client", "--lab", lab.name, "-o", "json")
    (row,) = json.loads(done.stdout)
    assert (row["identity"], row["pods"]) == (
        "spiffe://cluster.local/ns/shop/sa/client", ["shop/client"],
    )  # fmt: skip


def test_who_is_not_root_is_told_so(lab: Lab) -> None:
    # The interpreter may be where only root can read, so the right goes when all is imported.
    code = (
        "import os, sys; from agent.cli import main; import agent.commands.diff;"
        " os.seteuid(65534); main(prog_name='sidestep')"
    )
    command = [sys.executable, "-c", code, "diff", "--lab", lab.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: be root: ")


def kill_agent(lab: Lab, node: LabNode) -> None:
    for pid in machine.processes_of(lab.cgroup / node.name / "agent"):
        os.kill(pid, signal.SIGKILL)
        machine.wait_for_exit(pid, 5)


@pytest.mark.parametrize("listing", ["certs", "connections", "diff", "policies"])
def test_dead_agent_hides_nothing_of_the_others(lab: Lab, listing: str) -> None:
    east, west = lab.cluster().nodes
    kill_agent(lab, west)
    done = run(listing, "--lab", lab.name)
    assert done.returncode == 1
    assert done.stderr.startswith(f"warning: no agent answers at {lab.admin_socket(west)}: ")
    assert done.stdout != ""
    if listing == "certs":
        assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == {east.name}
    # What every agent knows is asked of one that is there.
    assert run("workloads", "--lab", lab.name).returncode == 0


def test_every_map_is_listed(dead: Lab) -> None:
    found = rows(dead, "maps", "list")
    nodes = len(dead.cluster().nodes)
    assert sorted(row["name"] for row in found) == sorted((*MAPS, *RING_BUFFERS) * nodes)
    assert [row for row in found if row["type"].isdecimal()] == []  # types without a name


def test_what_is_about_one_pod_is_picked_out(dead: Lab) -> None:
    found = rows(dead, "maps", "list", "--pod", "shop/client")
    assert {row["node"] for row in found} == {"east"}
    assert {row["name"]: row["entries"] for row in found}["ss_pods"] == 1
    attached = rows(dead, "programs", "--pod", "shop/server")
    assert {row["node"] for row in attached} == {"west"}
    (lookup,) = [row for row in attached if row["name"] == "ss_lookup"]
    assert lookup["pods"] == ["shop/server"]
    assert rows(dead, "programs", "-n", "shop", "--node", "west") == attached


def test_pods_have_their_names_and_addresses(dead: Lab) -> None:
    found = rows(dead, "maps", "dump", "ss_pods")
    assert {(row["pod"], row["address4"], row["address6"]) for row in found} == {
        (f"{pod.namespace}/{pod.name}", str(pod.address4), str(pod.address6))
        for pod in dead.cluster().pods
    }


def test_programs_tell_where_they_are_attached(dead: Lab) -> None:
    found = rows(dead, "programs")
    assert {row["name"] for row in found} >= set(PROGRAMS)
    (connect, *_more) = [row for row in found if row["name"] == "ss_connect4"]
    assert "cgroup" in connect["attached"]
    lookups = [row["attached"] or "" for row in found if row["type"] == "sk_lookup"]
    for pod in dead.cluster().pods:
        assert any(f"pod {pod.namespace}/{pod.name}" in place for place in lookups), lookups


def test_archive_of_dead_agents_has_the_pins_and_says_what_is_missing(
    dead: Lab, tmp_path: Path
) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_text("the one before")
    done = run("bundle", "-f", str(path), "--lab", dead.name)
    assert done.returncode == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    missing = done.stderr.splitlines()
    with tarfile.open(path) as archive:
        content = {
            member.name.partition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]  # they are files
            for member in archive
        }
    assert [f"missing: {line}" for line in content["problems.txt"].decode().splitlines()] == missing
    for node in dead.cluster().nodes:
        assert any(line.startswith(f"missing: agents/{node.name}/state.json: ") for line in missing)
        assert json.loads(content[f"pins/{dead.name}/{node.name}/ss_pods.json"])
        assert b"pod enrolled" in content[f"agents/{node.name}/agent.log"]


def test_every_map_can_be_dumped_or_says_why_not(dead: Lab) -> None:
    for name in MAPS:
        done = run("maps", "dump", name, "-o", "json", "--pins", str(dead.pins))
        if done.returncode == 0:
            json.loads(done.stdout)
        else:
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert line.startswith("error: ")
            assert name in line


def test_unknown_map_is_an_error_that_names_those_there_are() -> None:
    done = run("maps", "dump", "pods")
    assert done.returncode == 2
    assert "there is no map 'pods'" in done.stderr
    assert "ss_pods" in done.stderr


def test_check_finds_all_that_is_required_here() -> None:
    done = run("check", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {row["ok"] for row in found if row["required"]} == {True}
    assert {"root", "bpffs"} <= {row["check"] for row in found}


WITHOUT_ROOT = """
import importlib, os, sys
from agent.cli import main
importlib.import_module(f"agent.commands.{sys.argv[1]}")
os.seteuid(65534)
main(prog_name="sidestep")
"""


@pytest.mark.parametrize("words", [
    ["pods"], ["programs"], ["maps", "list"], ["bundle"], ["uninstall"], ["lab", "status"],
])  # fmt: skip
def test_what_needs_root_says_so_in_one_sentence(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The interpreter may be where only root can read, so the right goes when all is imported.
    command = [sys.executable, "-c", WITHOUT_ROOT, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: root is missing, the user id is 65534: run as root\n"


def test_check_without_root_says_so_in_one_sentence() -> None:
    # The interpreter may be where only root can read, so the right goes when all is imported.
    code = (
        "import os; from agent.cli import main; import agent.commands.check;"
        " os.seteuid(65534); main(prog_name='sidestep')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "-o", "json"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this machine cannot run Sidestep: root")

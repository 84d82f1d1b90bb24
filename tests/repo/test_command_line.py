"""Every command is as the others: help, examples that parse, options that say what they do."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.shell_completion import ShellComplete

from agent.cli import COMMANDS, main
from agent.commands.agent import is_authority

if TYPE_CHECKING:
    from collections.abc import Iterator

LISTINGS = {
    "check", "pods", "workloads", "services", "policies", "certs", "connections", "explain", "diff",
    "maps list", "maps dump", "programs", "lab status", "bench",
}  # fmt: skip
# Not so: one machine's checks, one connection explained, and measures.
FILTERED = LISTINGS - {"check", "explain", "bench"}


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                assert found is not None
                yield f"{name} {below}", found


ALL = dict(commands())


def option_names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("name", ALL)
def test_help_says_what_it_does_with_examples(name: str) -> None:
    command = ALL[name]
    assert command.help
    assert command.epilog is not None
    assert f"\n  sidestep {name.split()[0]}" in command.epilog


@pytest.mark.parametrize("name", ALL)
def test_every_option_says_what_it_is_for(name: str) -> None:
    options = [each for each in ALL[name].params if isinstance(each, click.Option)]
    assert [each.name for each in options if not each.help] == []


def example_lines() -> Iterator[str]:
    for command in (main, *ALL.values()):
        for line in (command.epilog or "").splitlines():
            if line.startswith("  sidestep "):
                yield line.strip()


@pytest.mark.parametrize("line", sorted(set(example_lines())))
def test_examples_are_what_the_commands_take(
    line: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("examples")
    for name in ("objects", "ca"):
        (place / name).mkdir()
    (place / "cluster.yaml").touch()
    monkeypatch.chdir(place)
    _sidestep, *words = shlex.split(line, comments=True)
    context = click.Context(main)
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        _name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("name", sorted(LISTINGS))
def test_listings_are_printed_in_one_of_three_ways(name: str) -> None:
    (output,) = [each for each in ALL[name].params if each.name == "output"]
    assert isinstance(output.type, click.Choice)
    assert list(output.type.choices) == ["table", "json", "yaml"]
    assert output.opts == ["-o", "--output"]


@pytest.mark.parametrize("name", sorted(FILTERED))
def test_listings_of_pods_are_filtered_alike(name: str) -> None:
    assert {"--pod", "--namespace", "-n", "--node"} <= option_names(ALL[name])


def test_list_of_commands_has_whole_sentences() -> None:
    with click.Context(main, info_name="sidestep", terminal_width=80) as context:
        text = " ".join(main.get_help(context).split())
    assert "..." not in text.replace("[ARGS]...", "")
    assert "off this node, also what an agent that crashed has left." in text


def test_shell_completes_commands_and_maps() -> None:
    complete = ShellComplete(main, {}, "sidestep", "_SIDESTEP_COMPLETE")
    assert [each.value for each in complete.get_completions([], "con")] == ["connections"]
    found = [each.value for each in complete.get_completions(["maps", "dump"], "ss_po")]
    assert found == ["ss_pods", "ss_pod_names", "ss_ports"]


def test_version_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sidestep 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["connections", "--socket", "/nowhere/agent.sock"],
        ["certs", "--socket", "/nowhere/agent.sock"],
        ["diff", "--run-dir", "/nowhere"],
        ["policies", "--lab", "none"],
        ["check", "--repair", "--run-dir", "/nowhere"],
        ["pods", "--pins", "/nowhere"],
        ["bundle", "-f", "/nowhere/bundle.tar.gz"],
        ["ca", "rotate-root", "--stage", "sign", "--directory", "/nowhere"],
        ["maps", "dump", "ss_pods", "--pins", "/nowhere"],
        ["maps", "dump", "nothing"],
        ["connections", "--no-such-option"],
    ],
)
def test_command_that_cannot_run_says_so_in_one_line_and_ends_with_2(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "agent.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.lower().strip().splitlines()[-1].startswith("error: ")


def run(*arguments: str) -> tuple[int, str]:
    """Run a command; return its exit code and what it says on stderr."""
    command = [sys.executable, "-m", "agent.cli", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "address", ["nocolon", "127.0.0.1:99999", "host:0", "host:x", ":15012", "::1:15012", "host:1/x"]
)
def test_address_of_no_ca_is_known(address: str) -> None:
    assert not is_authority(address)


@pytest.mark.parametrize(
    "address", ["10.0.0.1:15012", "[::1]:15012", "sidestep-ca.sidestep-system.svc:15012", "unix:s"]
)
def test_address_of_a_ca_is_taken(address: str) -> None:
    assert is_authority(address)


@pytest.mark.root
def test_agent_without_an_address_of_a_ca_does_not_start(tmp_path: Path) -> None:
    own = str(tmp_path)
    places = ("--objects", own, "--run-dir", own, "--pins", own)
    code, said = run("agent", "--node", "n", *places, "--ca", "nocolon")
    assert (code, said) == (2, "error: --ca nocolon: must be HOST:PORT or unix:PATH\n")


def test_ca_without_a_cluster_asks_for_tokens(tmp_path: Path) -> None:
    code, said = run("ca", "--directory", str(tmp_path / "ca"), "--objects", str(tmp_path))
    assert code == 2
    assert said.startswith("error: give --tokens beside --objects")
    assert not (tmp_path / "ca").exists()


def test_installation_that_fails_names_the_option_and_what_to_look_at() -> None:
    code, said = run("cni", "install", "--networks", "/nowhere")
    assert (code, said) == (
        2,
        "error: --networks /nowhere: /nowhere: No such file or directory; is this the host's "
        "directory, and may it be written here?\n",
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_takes_is_one_line(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "check", "-o", "json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "error: the output cannot be written: [Errno 28] No space left on device\n",
    )


def test_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "check"],
            stdout=broken, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.stderr == ""

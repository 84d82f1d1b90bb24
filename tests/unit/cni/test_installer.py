"""The installer against real directories: what it writes, keeps up, and takes away."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from cni import installer
from cni.conflist import PLUGIN_TYPE
from cni.contention import MOST_STRIKES
from cni.installer import InstallError, Places, install, keep_out, uninstall, watch
from cni.protocol import SUCCESS
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFLIST = (
    '{\n  "cniVersion": "1.0.0", "name":  "pods",\n  "plugins": [\n    {"type": "bridge"}\n  ]\n}\n'
)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("net.d", "bin"):
        (tmp_path / name).mkdir()
    return Places(
        tmp_path / "net.d", tmp_path / "bin", tmp_path / "state", tmp_path / "cni.sock", ("spared",)
    )


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(
        f"{record.getMessage()}: {vars(record).get('detail', '')}" for record in caplog.records
    )


@pytest.fixture
def conflist(places: Places) -> Path:
    path = places.networks / "10-pods.conflist"
    path.write_text(CONFLIST)
    path.chmod(0o640)
    return path


def types(conflist: Path) -> list[str]:
    return [plugin["type"] for plugin in json.loads(conflist.read_text())["plugins"]]


def tree(places: Places) -> dict[str, tuple[int, bytes]]:
    root = places.networks.parent
    return {
        str(path.relative_to(root)): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in root.rglob("*")
    }


@contextmanager
def watching(places: Places) -> Iterator[threading.Thread]:
    reading, writing = os.pipe()
    thread = threading.Thread(target=watch, args=(places, reading))
    thread.start()
    try:
        yield thread
    finally:
        os.close(writing)  # the other end is readable then
        thread.join(10)
        os.close(reading)
        assert not thread.is_alive()


@contextmanager
def agent(places: Places) -> Iterator[None]:
    """Answer as an agent that can serve."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(places.socket))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while connection.recv(65536):
                    pass
                connection.sendall(SUCCESS)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        places.socket.unlink()


def test_installing_and_uninstalling_leaves_everything_as_it_was(
    places: Places, conflist: Path
) -> None:
    before = tree(places)
    assert install(places) == conflist.name
    assert types(conflist) == ["bridge", "sidestep"]
    assert conflist.stat().st_mode & 0o777 == 0o640
    assert places.plugin.read_bytes() == places.shim.read_bytes()
    assert os.access(places.plugin, os.X_OK)
    assert places.record.exists()
    installed = tree(places)
    install(places)
    assert tree(places) == installed
    uninstall(places)
    assert tree(places) == before
    uninstall(places)
    assert tree(places) == before


def test_entry_says_where_the_agent_is_and_who_is_spared(places: Places, conflist: Path) -> None:
    install(places)
    entry = json.loads(conflist.read_text())["plugins"][-1]
    assert entry == {
        "type": "sidestep",
        "agentSocket": str(places.socket),
        "installedRecord": str(places.record),
        "excludeNamespaces": ["spared"],
    }
    install(replace(places, excluded_namespaces=()))
    assert json.loads(conflist.read_text())["plugins"][-1]["excludeNamespaces"] == []


def test_node_without_a_network_says_what_to_do(places: Places) -> None:
    with pytest.raises(InstallError, match="sidestep cni watch"):
        install(places)
    assert not places.record.exists()


def test_plugin_that_was_not_built_says_what_to_do(places: Places, conflist: Path) -> None:
    with pytest.raises(InstallError, match=r"build_shim\.sh"):
        install(replace(places, shim=Path("/nowhere/shim")))
    assert conflist.read_text() == CONFLIST


def test_file_behind_a_link_is_changed_and_the_link_stays(places: Places, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.conflist"
    target.write_text(CONFLIST)
    link = places.networks / "10-pods.conflist"
    link.symlink_to(target)
    install(places)
    assert link.is_symlink()
    assert types(target) == ["bridge", "sidestep"]
    uninstall(places)
    assert target.read_text() == CONFLIST


def test_readers_never_see_half_a_file(places: Places, conflist: Path) -> None:
    done = threading.Event()
    seen = set()

    def read() -> None:
        while not done.is_set():
            seen.add(tuple(types(conflist)))  # raises on half a file

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        install(places)
        uninstall(places)
    done.set()
    reader.join()
    assert seen <= {("bridge",), ("bridge", "sidestep")}


def test_first_entry_waits_for_the_agent_and_later_ones_do_not(
    places: Places, conflist: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with watching(places):
        wait_until(lambda: "waits until the agent serves" in said(caplog))
        assert conflist.read_text() == CONFLIST
        with agent(places):
            wait_until(lambda: types(conflist) == ["bridge", "sidestep"])
    # The node starts again: its network is written anew, and no agent is there.
    conflist.unlink()
    with watching(places):
        wait_until(lambda: "no network configuration yet" in said(caplog))
        conflist.write_text(CONFLIST)
        wait_until(lambda: types(conflist) == ["bridge", "sidestep"])


@pytest.mark.parametrize("how", ["in place", "renamed", "other file first", "plugin deleted"])
def test_what_others_take_away_comes_back(
    places: Places, conflist: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    install(places)
    with watching(places):
        other = places.networks / "05-other.conflist"
        wait_until(lambda: "entry is in place" in said(caplog))
        match how:
            case "in place":
                conflist.write_text(CONFLIST)
            case "renamed":
                draft = places.networks.parent / "draft"
                draft.write_text(CONFLIST)
                draft.replace(conflist)
            case "other file first":
                other.write_text(CONFLIST.replace("bridge", "ptp"))
                wait_until(lambda: types(other) == ["ptp", "sidestep"])
                wait_until(lambda: types(conflist) == ["bridge"])  # a moment after the other
                return
            case _:
                places.plugin.unlink()
                wait_until(places.plugin.exists)
        wait_until(lambda: types(conflist) == ["bridge", "sidestep"])


def test_fight_is_given_up_and_said(
    places: Places,
    conflist: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cni.contention.FIRST_WAIT_SECONDS", 0.001)
    install(places)
    has_ended = threading.Event()

    def fight() -> None:
        """Take the entry away whenever it is there, as Cilium does by default."""
        while not has_ended.wait(0.01):
            if PLUGIN_TYPE in conflist.read_text():
                conflist.write_text(CONFLIST)

    opponent = threading.Thread(target=fight)
    with watching(places):
        wait_until(lambda: "entry is in place" in said(caplog))
        opponent.start()
        try:
            wait_until(lambda: "we stop putting it back" in said(caplog))
        finally:
            has_ended.set()
            opponent.join()
        conflist.write_text(CONFLIST)
    assert types(conflist) == ["bridge"]
    texts = [record.getMessage() for record in caplog.records]
    assert texts.count("our entry was taken away and is put back") == MOST_STRIKES
    assert len([each for each in texts if "cni.exclusive=false" in each]) == 1


def test_watch_ends_when_somebody_uninstalls(
    places: Places, conflist: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(places)
    with watching(places) as thread:
        wait_until(lambda: "entry is in place" in said(caplog))
        uninstall(places)
        thread.join(10)
        assert not thread.is_alive()
    assert conflist.read_text() == CONFLIST
    assert not places.plugin.exists()


def test_watch_that_starts_after_the_emergency_exit_waits_for_an_installation(
    places: Places, conflist: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(places)
    with agent(places), watching(places):
        wait_until(lambda: "entry is in place" in said(caplog))
        keep_out(places)
        wait_until(lambda: "keeps us out" in said(caplog))
        assert conflist.read_text() == CONFLIST
    caplog.clear()
    # The kubelet starts the container again, on a node whose agent is well.
    with agent(places), watching(places):
        wait_until(lambda: "keeps us out" in said(caplog))
        assert conflist.read_text() == CONFLIST
        assert not places.plugin.exists()
        install(places)
        wait_until(lambda: "entry is in place" in said(caplog))
        conflist.write_text(CONFLIST)
        wait_until(lambda: types(conflist) == ["bridge", "sidestep"])


def test_emergency_exit_leaves_nothing_to_uninstall_and_nothing_where_no_watch_was(
    places: Places, conflist: Path
) -> None:
    before = tree(places)
    keep_out(places)
    assert tree(places) == before
    install(places)
    keep_out(places)
    assert [path.name for path in places.state.iterdir()] == ["kept-out"]
    uninstall(places)
    assert tree(places) == before


def test_list_of_a_network_that_its_owner_removed_goes_too(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    single = places.networks / "10-pods.conf"
    single.write_text('{"cniVersion": "1.0.0", "name": "pods", "type": "bridge"}')
    install(places)
    with watching(places):
        wait_until(lambda: "entry is in place" in said(caplog))
        single.unlink()
        wait_until(lambda: not list(places.networks.iterdir()))
    single.write_text('{"cniVersion": "1.0.0", "name": "pods", "type": "bridge"}')
    install(places)
    single.unlink()
    with pytest.raises(InstallError, match="no network configuration yet"):
        install(places)
    assert not list(places.networks.iterdir())


def test_link_to_what_is_not_there_is_passed_over_and_said(
    places: Places, conflist: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = places.networks / "05-first.conflist"
    link.symlink_to("/not/mounted/here.conflist")
    install(places)
    with watching(places):
        wait_until(lambda: "entry is in place" in said(caplog))
        (places.networks / "touched").touch()  # another look
    told = [vars(each) for each in caplog.records if "leads nowhere" in each.getMessage()]
    assert [each["file"] for each in told] == [str(link)]
    assert types(conflist) == ["bridge", "sidestep"]


def test_watch_of_a_new_version_waits_for_the_end_of_the_one_before(
    places: Places, conflist: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    other = tmp_path / "other-shim"
    other.write_bytes(b"of another version")
    newer = replace(places, shim=other, excluded_namespaces=("new",))
    install(places)
    before = tree(places)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(watching(places))
        wait_until(lambda: "entry is in place" in said(caplog))
        second.enter_context(watching(newer))
        wait_until(lambda: "waiting for its end" in said(caplog))
        assert tree(places) == before
        first.close()
        wait_until(lambda: '"excludeNamespaces": ["new"]' in conflist.read_text())
        assert places.plugin.read_bytes() == b"of another version"
    assert types(conflist) == ["bridge", "sidestep"]


def test_directory_that_comes_later_is_waited_for(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    places.networks.rmdir()
    places.state.mkdir()
    places.record.touch()
    with watching(places):
        wait_until(lambda: str(places.networks) in said(caplog))
        places.networks.mkdir()
        conflist = places.networks / "10-pods.conflist"
        conflist.write_text(CONFLIST)
        wait_until(lambda: types(conflist) == ["bridge", "sidestep"])


def test_failing_write_leaves_the_file_and_no_draft(places: Places, conflist: Path) -> None:
    with pytest.raises(OSError, match="No such"):
        installer._replace(places.networks / "gone/file", b"", 0o600)
    assert [path.name for path in places.networks.iterdir()] == [conflist.name]


def test_draft_of_an_installer_that_was_killed_is_no_obstacle_and_goes(
    places: Places, conflist: Path, tmp_path: Path
) -> None:
    before = tree(places)
    pid = os.fork()
    if not pid:
        with patch("os.fsync", lambda _fd: os.kill(os.getpid(), signal.SIGKILL)):
            install(places)
    os.waitpid(pid, 0)
    assert tree(places) != before
    uninstall(places)
    assert tree(places) == before
    # Nor is it followed, if it is somebody's link.
    mine = tmp_path / "mine"
    mine.touch()
    (places.plugins / f".sidestep{installer.DRAFT}").symlink_to(mine)
    install(places)
    assert places.plugin.read_bytes() == places.shim.read_bytes()
    assert mine.read_bytes() == b""


def test_commands_install_keep_and_uninstall(places: Places, conflist: Path) -> None:
    where = [
        "--networks", str(places.networks), "--plugins", str(places.plugins),
        "--state", str(places.state),
    ]  # fmt: skip
    entry = ["--socket", str(places.socket), "--exclude-namespace", "spared"]
    command = [sys.executable, "-m", "agent.cli", "cni"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], capture_output=True, text=True, check=False)

    conflist.unlink()
    refused = run("install", *where, *entry)
    assert refused.returncode == 2
    assert "has no network configuration yet" in refused.stderr
    conflist.write_text(CONFLIST)
    done = run("install", *where, *entry)
    assert (done.returncode, done.stdout) == (0, f"{conflist} has the plugin\n")
    installed = conflist.read_text()
    conflist.write_text(CONFLIST)
    with subprocess.Popen([*command, "watch", *where, *entry], stderr=subprocess.PIPE) as watcher:
        try:
            wait_until(lambda: conflist.read_text() == installed)
        finally:
            watcher.send_signal(signal.SIGTERM)
        assert watcher.wait(10) == 0
    # Ending is no uninstalling: the agent's pod may only be replaced.
    assert conflist.read_text() == installed
    assert run("uninstall", *where).returncode == 0
    assert conflist.read_text() == CONFLIST
    assert [path.name for path in places.state.iterdir()] == ["kept-out"]

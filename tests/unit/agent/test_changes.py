"""Changes of files are told once they are over, and without one nothing runs."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from agent import changes
from agent.changes import Changes
from agent.discovery.directory import DirectorySource
from agent.errors import FeatureMissing
from agent.identity import files
from agent.kubelet import Probers
from cni.inotify import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.datapath.maps import Map

IDLE_SECONDS = 0.5
MOST_WAKE_UPS = 20  # the garbage collector and the interpreter's own locks; a poller has hundreds


def test_who_follows_files_sleeps_while_nothing_changes(tmp_path: Path) -> None:
    class NoProbers:
        def items(self) -> list[tuple[dict[str, int], dict[str, int]]]:
            return []

    async def run() -> int:
        stop, armed = asyncio.Event(), asyncio.Semaphore(0)

        async def follow_files() -> None:
            async for _ in files.changes([tmp_path], stop):
                armed.release()

        async def follow_objects() -> None:
            async for _ in DirectorySource(tmp_path).watch(stop):
                armed.release()

        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(follow_objects())
            await armed.acquire()
            tasks.create_task(follow_files())
            await armed.acquire()
            cgroup = tmp_path / "slice/kubelet.service"
            tasks.create_task(Probers(cast("Map", NoProbers()), cgroup).follow(stop))
            await asyncio.sleep(IDLE_SECONDS / 5)  # what is begun comes to rest
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
            await asyncio.sleep(IDLE_SECONDS)
            woken = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
            stop.set()
        return woken

    assert asyncio.run(run()) < MOST_WAKE_UPS


def write_in_place(path: Path) -> None:
    path.write_text("b")


def replace(path: Path) -> None:
    draft = path.with_name("draft")
    draft.write_text("b")
    draft.replace(path)


def cut_off(path: Path) -> None:
    os.truncate(path, 0)


def let_be_read(path: Path) -> None:
    path.chmod(0o600)


def remove(path: Path) -> None:
    path.unlink()


def remove_all(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


@pytest.mark.parametrize(
    "change", [write_in_place, replace, cut_off, let_be_read, remove, remove_all]
)
def test_change_is_told_once(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "watched/file"
    path.parent.mkdir()
    path.write_text("a")

    async def run() -> None:
        stop = asyncio.Event()
        with Changes(path.parent) as watched:
            assert not await watched.wait(stop, 0.02)
            change(path)
            assert await watched.wait(stop, 5)
            assert not await watched.wait(stop, 0.1)

    asyncio.run(run())


def test_what_is_written_without_a_pause_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "QUIET_SECONDS", 5.0)  # longer than any pause of ours
    is_over = threading.Event()

    def write() -> None:
        while not is_over.wait(0.001):
            (tmp_path / "file").write_text("a")

    async def run() -> None:
        with Changes(tmp_path) as watched:
            assert await watched.wait(asyncio.Event(), 5)
            assert await watched.wait(asyncio.Event(), 5)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        asyncio.run(asyncio.wait_for(run(), 4))
    finally:
        is_over.set()
        writer.join()


def test_stop_ends_the_wait(tmp_path: Path) -> None:
    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, stop.set)
        with Changes(tmp_path) as watched:
            assert not await watched.wait(stop)
            (tmp_path / "file").touch()
            assert not await watched.wait(stop)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_names_alone_say_nothing_of_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def run() -> None:
        stop = asyncio.Event()
        with Changes(tmp_path, events=NAMES) as watched:
            (tmp_path / "file").write_text("a")
            assert not await watched.wait(stop, 0.05)
            (tmp_path / "other").mkdir()
            assert await watched.wait(stop, 5)

    asyncio.run(run())


def test_drafts_are_no_change_and_what_becomes_of_them_is(tmp_path: Path) -> None:
    draft = tmp_path / "file.draft"
    change_directory = partial(tmp_path.chmod, 0o700)

    async def run() -> None:
        stop = asyncio.Event()
        with Changes(tmp_path, ignored_suffix=".draft") as watched:
            draft.write_text("a")
            assert not await watched.wait(stop, 0.05)
            draft.replace(tmp_path / "file")
            assert await watched.wait(stop, 5)
            change_directory()
            assert await watched.wait(stop, 5)

    asyncio.run(run())


def test_directory_that_is_made_anew_can_be_followed(tmp_path: Path) -> None:
    inner = tmp_path / "inner"

    async def run() -> None:
        stop = asyncio.Event()
        with Changes(tmp_path) as watched:
            watched.follow(inner)  # there is none yet
            for _ in range(2):
                inner.mkdir()
                assert await watched.wait(stop, 5)
                watched.follow(inner)
                watched.follow(inner)
                (inner / "file").touch()
                assert await watched.wait(stop, 5)
                (inner / "file").unlink()
                inner.rmdir()
                assert await watched.wait(stop, 5)

    asyncio.run(run())


def test_machine_that_lets_nobody_watch_any_more_is_told_of(tmp_path: Path) -> None:
    async def run() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            Changes(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with pytest.raises(FeatureMissing, match=r"Too many open files.*max_user_instances"):
        asyncio.run(run())


def test_absent_directory_is_not_found_and_leaves_nothing_open(tmp_path: Path) -> None:
    async def run() -> None:
        Changes(tmp_path, tmp_path / "absent")

    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with pytest.raises(FileNotFoundError, match="absent"):
        asyncio.run(run())
    assert len(list(descriptors.iterdir())) == before

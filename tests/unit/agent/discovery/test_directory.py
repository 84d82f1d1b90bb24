"""The directory source: first reading, changes, published status, and files that are wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import threading
import time
from typing import TYPE_CHECKING

import pytest

from agent.discovery import directory
from agent.discovery.directory import MOST_BYTES, DirectorySource
from agent.errors import ConfigError
from agent.model.policy import Policy
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent.discovery.translate import SourcedObject

NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u-1}
spec: {nodeName: n1, serviceAccountName: cart}
status: {phase: Running, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
"""


MOST_READS = 3  # the first, and what `publish` wakes


def fill(directory: Path) -> None:
    (directory / "shop.yaml").write_text(NAMESPACE + "---" + POD)


def test_pod_of_an_ambient_namespace_wants_the_mesh(tmp_path: Path) -> None:
    fill(tmp_path)
    snapshot = DirectorySource(tmp_path).read()
    (pod,) = snapshot.local_pods["n1"]
    assert (pod.uid, pod.name, pod.service_account) == ("u-1", "cart", "cart")
    (workload,) = snapshot.workloads
    assert not workload.is_hbone


def test_published_status_makes_a_workload_speak_hbone(tmp_path: Path) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    (pod,) = source.read().local_pods["n1"]
    source.publish(pod, "enabled")
    assert source.read().workloads[0].is_hbone
    assert source.problems == ()
    source.publish(pod, None)
    assert not source.read().workloads[0].is_hbone


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: [", "cannot be read"),
        ("- just\n- a list\n", "is not an object"),
        ("since: 2001-13-01\n", "month must be in 1..12"),
        ("size: " + "1" * 5000, "digits"),
        ("[" * 100_000, "nesting"),
        (POD.replace("10.0.0.1", "10.0.0.300"), "status.podIPs"),
    ],
)
def test_wrong_file_is_named_and_its_last_good_state_stays(
    tmp_path: Path, text: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    before = source.read()
    (tmp_path / "shop.yaml").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert source.read() == before
        assert source.read() == before
    (problem,) = source.problems
    assert expected in str(problem)
    assert str(tmp_path / "shop.yaml") in str(problem)
    assert len(caplog.records) == 1
    (tmp_path / "shop.yaml").unlink()
    assert source.read() == Snapshot()
    assert source.problems == ()


@pytest.mark.parametrize(
    "metadata",
    [
        "{name: a, namespace: b, uid: u, annotations: 5}",
        "{name: a, namespace: b, uid: u, annotations: [x]}",
        "{name: a, namespace: b, uid: u, annotations: words}",
        "{name: [a], namespace: b, uid: u}",
        "{name: a, namespace: {b: c}, uid: u}",
    ],
)
def test_pod_whose_metadata_is_of_another_shape_is_a_problem_of_its_own(
    tmp_path: Path, metadata: str
) -> None:
    fill(tmp_path)
    (tmp_path / "odd.yaml").write_text(f"apiVersion: v1\nkind: Pod\nmetadata: {metadata}\n")
    source = DirectorySource(tmp_path)
    assert [workload.name for workload in source.read().workloads] == ["cart"]
    (problem,) = source.problems
    assert problem.file == str(tmp_path / "odd.yaml")


def test_fifo_holds_up_nobody(tmp_path: Path) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "status" / "shop.cart.yaml")
    assert [workload.name for workload in source.read().workloads] == ["cart"]
    assert source.problems == ()


def test_changes_arrive_within_a_second(tmp_path: Path) -> None:
    async def follow() -> None:
        source = DirectorySource(tmp_path)
        stop = asyncio.Event()
        snapshots = source.watch(stop)
        async with asyncio.timeout(5):
            assert await anext(snapshots) == Snapshot()
            changes: list[Callable[[], None]] = [
                lambda: fill(tmp_path),
                (tmp_path / "shop.yaml").unlink,
            ]
            for change in changes:
                before = asyncio.get_running_loop().time()
                change()
                snapshot = await anext(snapshots)
                assert asyncio.get_running_loop().time() - before < 1
                assert bool(snapshot.workloads) == (tmp_path / "shop.yaml").exists()
            stop.set()
            assert [snapshot async for snapshot in snapshots] == []

    asyncio.run(follow())


def test_missing_directory_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        DirectorySource(tmp_path / "nowhere")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are parsed from now on."""
    names = []
    read = directory.read_objects

    def remember(path: Path) -> list[SourcedObject]:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(directory, "read_objects", remember)
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time go by until no file counts as just written."""
    later = time.time_ns() + 10 * directory.UNSETTLED_NANOSECONDS
    monkeypatch.setattr("agent.discovery.directory.time.time_ns", lambda: later)


def test_only_files_that_changed_are_parsed_again(
    tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    (tmp_path / "wrong.yaml").write_text("kind: [")
    source = DirectorySource(tmp_path)
    settle(monkeypatch)
    first = source.read()
    source.publish(first.local_pods["n1"][0], "enabled")
    source.read()
    assert sorted(parsed) == ["shop.cart.yaml", "shop.yaml", "wrong.yaml"]
    assert source.read().workloads[0].is_hbone
    assert len(source.problems) == 1  # still said, though not found again
    parsed.clear()
    (tmp_path / "more.yaml").write_text(POD.replace("cart", "more").replace("u-1", "u-2"))
    assert len(source.read().workloads) == 2
    (tmp_path / "more.yaml").unlink()
    assert len(source.read().workloads) == 1
    assert parsed == ["more.yaml"]


def test_change_that_keeps_size_and_time_is_seen(
    tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    path = tmp_path / "shop.yaml"
    before = path.stat()
    source = DirectorySource(tmp_path)
    settle(monkeypatch)
    source.read()
    path.write_text(path.read_text().replace("10.0.0.1", "10.0.0.2"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert str(source.read().workloads[0].addresses[0]) == "10.0.0.2"
    assert len(parsed) == 2


def test_file_that_was_just_written_is_read_again(tmp_path: Path, parsed: list[str]) -> None:
    # Its next change may come within the same step of the file system's clock.
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    source.read()
    source.read()
    assert parsed == ["shop.yaml", "shop.yaml"]


def test_file_that_is_too_large_is_named_and_not_read(tmp_path: Path) -> None:
    fill(tmp_path)
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    source = DirectorySource(tmp_path)
    assert len(source.read().workloads) == 1
    (problem,) = source.problems
    assert str(problem).endswith(
        "large.yaml: file: size: is larger than 8 MiB; split it into several files"
    )


def test_reading_holds_up_no_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    threads = []
    read = source.read

    def remember() -> Snapshot:
        threads.append(threading.current_thread())
        return read()

    monkeypatch.setattr(source, "read", remember)

    async def run() -> None:
        stop = asyncio.Event()
        async for _snapshot in source.watch(stop):
            stop.set()

    asyncio.run(run())
    assert threading.main_thread() not in threads
    assert len(threads) == 1


def test_what_cannot_be_written_is_published_as_soon_as_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    (pod,) = source.read().local_pods["n1"]
    obstacle = tmp_path / "status/shop.cart.draft"
    obstacle.mkdir()

    async def run() -> None:
        stop = asyncio.Event()
        async for snapshot in source.watch(stop):
            if snapshot.workloads[0].is_hbone:
                stop.set()
            elif obstacle.exists():
                source.publish(pod, "pending")
                source.publish(pod, "enabled")
                assert "not written yet" in caplog.text
                obstacle.rmdir()

    asyncio.run(asyncio.wait_for(run(), 10))
    caplog.clear()
    obstacle.mkdir()
    DirectorySource(tmp_path).publish(pod, "enabled")  # it is there: nothing is to be written
    source.publish(pod, "enabled")
    source.publish(pod, "pending")
    source.publish(pod, None)
    assert caplog.text.count("not written yet") == 1
    assert not source.read().workloads[0].is_hbone


def test_what_nobody_is_told_of_lets_what_is_published_be_written(tmp_path: Path) -> None:
    # As on a disk that is full, and then is not.
    objects, elsewhere = tmp_path / "objects", tmp_path / "elsewhere"
    objects.mkdir()
    fill(objects)
    source = DirectorySource(objects)
    (pod,) = source.read().local_pods["n1"]
    (objects / "status/shop.cart.draft").symlink_to(elsewhere / "draft")

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()

            async def watch() -> None:
                async for snapshot in source.watch(stop):
                    if snapshot.workloads[0].is_hbone:
                        return
                    # While the watch waits, which it does without an end.
                    loop.call_later(0.1, source.publish, pod, "enabled")
                    loop.call_later(0.3, elsewhere.mkdir)

            tasks.create_task(watch())

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_cannot_be_written_wakes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    (pod,) = source.read().local_pods["n1"]
    reads: list[Snapshot] = []
    read = source.read

    def count_and_read() -> Snapshot:
        reads.append(read())
        return reads[-1]

    monkeypatch.setattr(source, "read", count_and_read)

    async def run() -> int:
        stop, is_armed = asyncio.Event(), asyncio.Event()

        async def watch() -> None:
            async for snapshot in source.watch(stop):
                is_armed.set()
                if snapshot.workloads[0].is_hbone:
                    stop.set()

        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            await is_armed.wait()
            # As on a full disk: a file can be made, and nothing written into it.
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
            try:
                source.publish(pod, "enabled")
                await asyncio.sleep(1)
                count = len(reads)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return count

    assert asyncio.run(run()) <= MOST_READS


@pytest.mark.parametrize("is_another", [False, True], ids=["moved back", "made anew"])
def test_directory_that_was_away_is_followed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_another: bool
) -> None:
    objects, away = tmp_path / "objects", tmp_path / "away"
    objects.mkdir()
    fill(objects)
    source = DirectorySource(objects)

    def come_back() -> None:
        if is_another:
            objects.mkdir()
        else:
            away.rename(objects)

    async def run() -> list[int]:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        counts: list[int] = []
        async for snapshot in source.watch(stop):
            counts.append(len(snapshot.workloads))
            if len(counts) == 1:
                objects.rename(away)
                loop.call_later(0.5, come_back)
                loop.call_later(1, fill, objects)
                loop.call_later(1.5, lambda: (objects / "shop.yaml").unlink())
            elif counts[-1] == 0 and (not is_another or len(counts) > 2):
                stop.set()
        return counts

    counts = asyncio.run(asyncio.wait_for(run(), 10))
    assert counts == ([1, 0, 1, 0] if is_another else [1, 0])
    assert caplog.text.count("objects are away") == 1


def test_status_directory_that_is_made_anew_is_followed(tmp_path: Path) -> None:
    fill(tmp_path)
    source = DirectorySource(tmp_path)
    (pod,) = source.read().local_pods["n1"]

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async for snapshot in source.watch(stop):
            if snapshot.workloads[0].is_hbone:
                stop.set()
            else:
                (tmp_path / "status").rmdir()
                (tmp_path / "status").mkdir()
                loop.call_later(0.3, source.publish, pod, "enabled")

    asyncio.run(asyncio.wait_for(run(), 10))


POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec: {rules: [{to: [{operation: {ports: [PORT]}}]}, {}]}
"""


def test_object_that_is_wrong_in_part_takes_the_place_of_what_its_file_said(tmp_path: Path) -> None:
    source = DirectorySource(tmp_path)
    rules = []
    for port in ('"80"', "http"):
        (tmp_path / "policy.yaml").write_text(POLICY.replace("PORT", port))
        (policy,) = source.read().policies
        assert isinstance(policy, Policy)
        rules.append([rule.position for rule in policy.rules])
    assert rules == [[0, 1], [1]]
    assert [problem.is_partial for problem in source.problems] == [True]

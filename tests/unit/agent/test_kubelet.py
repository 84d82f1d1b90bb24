"""The kubelet's cgroup is in the map, wherever it comes and goes, and whatever fails at first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar, cast

import pytest

from agent import kubelet
from agent.errors import MapError
from agent.kubelet import Probers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from agent.datapath.maps import Map

STALE = 7  # of an agent before


class ProbersMap:
    """What stands for ss_probers."""

    def __init__(self) -> None:
        self._entries = {STALE}
        self._is_changed = asyncio.Event()

    def items(self) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        return (({"value": entry}, {"value": 1}) for entry in list(self._entries))

    def put(self, key: dict[str, int], _value: object) -> None:
        self._entries.add(key["value"])
        self._is_changed.set()

    def delete(self, key: dict[str, int]) -> None:
        self._entries.remove(key["value"])
        self._is_changed.set()

    async def wait_for(self, *cgroups: Path) -> None:
        """Wait until it has these, and no others."""
        while self._entries != {each.stat().st_ino for each in cgroups}:
            await self._is_changed.wait()
            self._is_changed.clear()


class FailingMap(ProbersMap):
    """One of which the first call of each kind fails."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[str] = []

    def _fail_once(self, name: str) -> None:
        if name not in self.failed:
            self.failed.append(name)
            raise MapError(f"{name} fails")

    def items(self) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        self._fail_once("items")
        return super().items()

    def put(self, key: dict[str, int], value: object) -> None:
        self._fail_once("put")
        super().put(key, value)

    def delete(self, key: dict[str, int]) -> None:
        self._fail_once("delete")
        super().delete(key)


Probed = TypeVar("Probed", bound=ProbersMap)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what comes before it is watched found soon, since nothing shows that it is."""
    monkeypatch.setattr(kubelet, "LOOK_SECONDS", 0.1)


def follow(
    cgroup: Path, build: Callable[[], Probed], check: Callable[[Probed], Awaitable[None]]
) -> None:
    """Follow a cgroup while `check` changes it."""

    async def run() -> None:
        probers, stop = build(), asyncio.Event()
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(Probers(cast("Map", probers), cgroup).follow(stop))
            await check(probers)
            stop.set()

    asyncio.run(run())


def test_what_the_map_refuses_is_logged_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cgroup = tmp_path / "kubelet.service"
    cgroup.mkdir()

    async def check(probers: FailingMap) -> None:
        await probers.wait_for(cgroup)
        assert probers.failed == ["items", "put", "delete"]

    follow(cgroup, FailingMap, check)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert {record.getMessage() for record in warnings} == {"the kubelet's probes may not pass"}


def test_cgroup_is_found_when_its_slice_is_made_later(tmp_path: Path) -> None:
    cgroup = tmp_path / "kube.slice/node.slice/kubelet.service"

    async def check(probers: ProbersMap) -> None:
        await probers.wait_for()  # what an agent before wrote has gone, and it is not there
        cgroup.mkdir(parents=True)
        await probers.wait_for(cgroup)

    follow(cgroup, ProbersMap, check)


def test_slice_that_is_made_anew_is_followed(tmp_path: Path) -> None:
    cgroup = tmp_path / "node.slice/kubelet.service"

    async def check(probers: ProbersMap) -> None:
        for _ in range(3):
            cgroup.mkdir(parents=True)
            await probers.wait_for(cgroup)
            cgroup.rmdir()
            cgroup.parent.rmdir()
            await probers.wait_for()

    follow(cgroup, ProbersMap, check)


def test_what_nobody_is_told_of_is_found_as_well(tmp_path: Path) -> None:
    one, other = (tmp_path / name / "kubelet.service" for name in ("one", "other"))
    (tmp_path / "slice").symlink_to("one")

    async def check(probers: ProbersMap) -> None:
        one.mkdir(parents=True)
        await probers.wait_for(one)
        other.mkdir(parents=True)
        (tmp_path / "new").symlink_to("other")
        (tmp_path / "new").rename(tmp_path / "slice")
        await probers.wait_for(other)

    follow(tmp_path / "slice/kubelet.service", ProbersMap, check)

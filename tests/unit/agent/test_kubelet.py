"""The kubelet's cgroup is in the map, also where the map could not be written at first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from agent import kubelet
from agent.errors import MapError
from agent.kubelet import Probers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

    from agent.datapath.maps import Map

STALE = 7  # of an agent before


class FailingMap:
    """A map of which the first call of each kind fails; `is_changed` is set by the others."""

    def __init__(self) -> None:
        self.entries = {STALE}
        self.failed: list[str] = []
        self.is_changed = asyncio.Event()

    def _fail_once(self, name: str) -> None:
        if name not in self.failed:
            self.failed.append(name)
            raise MapError(f"{name} fails")

    def items(self) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        self._fail_once("items")
        return (({"value": entry}, {"value": 1}) for entry in list(self.entries))

    def put(self, key: dict[str, int], _value: object) -> None:
        self._fail_once("put")
        self.entries.add(key["value"])
        self.is_changed.set()

    def delete(self, key: dict[str, int]) -> None:
        self._fail_once("delete")
        self.entries.remove(key["value"])
        self.is_changed.set()


def test_what_the_map_refuses_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubelet, "LOOK_MILLISECONDS", 10)
    cgroup = tmp_path / "kubelet.service"
    cgroup.mkdir()

    async def check() -> None:
        probers, stop = FailingMap(), asyncio.Event()
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(Probers(cast("Map", probers), cgroup).follow(stop))
            while probers.entries != {cgroup.stat().st_ino}:
                await probers.is_changed.wait()
                probers.is_changed.clear()
            stop.set()
        assert probers.failed == ["items", "put", "delete"]

    asyncio.run(check())
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert {record.getMessage() for record in warnings} == {"the kubelet's probes may not pass"}

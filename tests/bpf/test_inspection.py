"""A look at what capture rests on costs little, and misses nothing for that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import pytest

from agent.datapath import libbpf, links
from agent.inspection import Inspection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent.datapath import pins
    from agent.roster import Roster

pytestmark = pytest.mark.root


class NoPods:
    """The roster of a node without pods of ours."""

    def enrollments(self) -> list[object]:
        return []


@pytest.fixture
def inspection(loaded: pins.Pins) -> Iterator[Inspection]:
    if loaded.lock < 0:
        loaded.hold()
    root = links.cgroup_root()
    yield Inspection(loaded, cast("Roster", NoPods()), dict, root, wanted=set)
    links.attach_cgroup(loaded, root)


def differences(inspection: Inspection) -> list[tuple[str, str, str | None]]:
    return [(each.kind, each.name, each.found) for each in inspection.find_lost()]


def put_in_place(pin: Path, other: Path) -> None:
    """Pin another object under a name."""
    with libbpf.closing(libbpf.open_pin(other)) as fd:
        pin.unlink()
        libbpf.pin(fd, pin)


def test_second_look_opens_no_pin(inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differences(inspection) == []
    monkeypatch.setattr(libbpf, "open_pin", lambda path: pytest.fail(f"{path} was opened"))
    assert differences(inspection) == []


def test_program_of_another_build_is_seen_where_its_pin_takes_the_place_of_ours(
    loaded: pins.Pins, inspection: Inspection
) -> None:
    assert differences(inspection) == []
    programs = loaded.directory / "programs"
    ours = os.dup(loaded._others["programs/ss_bind4"])
    found = libbpf.program_facts(ours).id
    put_in_place(programs / "ss_bind4", programs / "ss_bind6")
    assert differences(inspection) == [("link", "ss_bind4", f"another program: id {found}")]
    (programs / "ss_bind4").unlink()
    assert differences(inspection) == [("pin", "ss_bind4", None)]
    with libbpf.closing(ours):
        libbpf.pin(ours, programs / "ss_bind4")
    assert differences(inspection) == []


@pytest.mark.parametrize("part", ["maps", "programs", "links"])
def test_part_of_the_directory_that_is_no_directory_any_more_has_nothing(
    loaded: pins.Pins, inspection: Inspection, part: str
) -> None:
    place, aside = loaded.directory / part, loaded.directory / "aside"
    place.rename(aside)
    try:
        names = {path.name for path in aside.iterdir()}
        assert {name for _kind, name, _found in differences(inspection)} == names
        with libbpf.closing(libbpf.open_pin(aside / min(names))) as fd:
            libbpf.pin(fd, place)
        assert {name for _kind, name, _found in differences(inspection)} == names
        place.unlink()
    finally:
        aside.rename(place)
    assert differences(inspection) == []

"""One thing after the other is taken out of the kernel behind the agents' back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from agent import netns
from agent.datapath import pins
from agent.datapath.source import CGROUP_PROGRAMS
from tests.drills.ground import LONG, Ground, pause, run_drill
from tests.support.damage import detach, is_attached, mount_bpffs, unmount
from tests.support.full_map import full
from tests.support.modules import ROOT
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]
MENDED_SECONDS = 15.0
# A connection that nobody answers waits as long as its program likes; these are not to hide when
# others succeed again.
PATIENCE_SECONDS = 0.5


def directory_of(ground: Ground, number: int) -> Path:
    """Return the pins of a node, by its place in the cluster."""
    (directory,) = (ground.lab.pins / ground.nodes[number].name).glob("[0-9a-f]*")
    return directory


def link_of(ground: Ground, pod: str, program: str) -> Path:
    """Return the pin of a pod's link."""
    found = ground.lab.find_pod(pod)
    fd = netns.open_netns(ground.lab.pod_netns(found))
    try:
        cookie = netns.netns_cookie(fd)
    finally:
        os.close(fd)
    links = directory_of(ground, ground.nodes.index(found.node)) / "links"
    (link,) = links.glob(f"{program}_{cookie}*")
    return link


def wait_mended(is_mended: Callable[[], bool], since: float) -> float:
    """Wait until it is so, and return when the damage was done."""
    wait_until(is_mended, MENDED_SECONDS)
    return since


def detach_links(ground: Ground, *links: Path) -> float:
    assert all(is_attached(link) for link in links)
    began = time.monotonic()
    for link in links:
        detach(link)
    return wait_mended(lambda: all(is_attached(link) for link in links), began)


def connect_detached(ground: Ground) -> float:
    return detach_links(ground, directory_of(ground, 0) / "links/ss_connect4")


def sockops_detached(ground: Ground) -> float:
    return detach_links(ground, directory_of(ground, 0) / "links/ss_sockops")


def all_detached(ground: Ground) -> float:
    links = directory_of(ground, 0) / "links"
    return detach_links(ground, *(links / name for name in CGROUP_PROGRAMS))


def lookup_detached(ground: Ground) -> float:
    return detach_links(ground, *(link_of(ground, pod, "lookup") for pod in ("server", "cache")))


def guard_detached(ground: Ground) -> float:
    links = [link_of(ground, "client", f"guard_{way}") for way in ("in", "out")]
    return detach_links(ground, *links)


def pins_of(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if not path.is_dir()}


def pins_deleted(ground: Ground) -> float:
    directory = directory_of(ground, 0)
    before = pins_of(directory)
    began = time.monotonic()
    for path in before:
        path.unlink()
    return wait_mended(lambda: pins_of(directory) == before, began)


def directory_deleted(ground: Ground) -> float:
    directory = directory_of(ground, 0)
    before = pins_of(directory)
    began = time.monotonic()
    shutil.rmtree(directory)
    return wait_mended(lambda: pins_of(directory) == before, began)


def bpffs_unmounted(ground: Ground) -> float:
    directories = [directory_of(ground, number) for number in (0, 1)]
    before = [pins_of(directory) for directory in directories]
    began = time.monotonic()
    unmount(ground.lab.pins)
    return wait_mended(lambda: [pins_of(each) for each in directories] == before, began)


def bpffs_replaced(ground: Ground) -> float:
    """Take it away and mount an empty one, as somebody does who wants to be helpful."""
    directories = [directory_of(ground, number) for number in (0, 1)]
    before = [pins_of(directory) for directory in directories]
    began = time.monotonic()
    unmount(ground.lab.pins)
    mount_bpffs(ground.lab.pins)
    return wait_mended(lambda: [pins_of(each) for each in directories] == before, began)


def fill(ground: Ground, number: int, name: str) -> None:
    opened = pins.Pins(directory_of(ground, number))
    try:
        with full(opened.maps[name]):
            pause(5 if LONG else 0.5)
    finally:
        opened.close()


def origins_full(ground: Ground) -> None:
    fill(ground, 0, "ss_origin_flow")


def agent_flows_full(ground: Ground) -> None:
    fill(ground, 1, "ss_agent_flows")  # of the server's node, which dials it


def direct_flows_full(ground: Ground) -> None:
    fill(ground, 0, "ss_direct_flows")


# name, what to do, whether open connections by tunnel have to survive it, and whether CI has it
DRILLS: list[tuple[str, Callable[[Ground], float | None], bool, bool]] = [
    ("cgroup link of connect detached", connect_detached, True, True),
    ("cgroup link of sockops detached", sockops_detached, True, True),
    ("all cgroup links detached", all_detached, True, False),
    ("sk_lookup links detached", lookup_detached, True, True),
    ("guard's tcx links detached", guard_detached, True, True),
    ("all pins of a node deleted", pins_deleted, True, True),
    ("pin directory of a node deleted", directory_deleted, True, False),
    ("bpffs unmounted", bpffs_unmounted, True, True),
    ("bpffs unmounted, and an empty one mounted", bpffs_replaced, True, False),
    ("map of original destinations full", origins_full, True, True),
    ("map of the agent's connections full", agent_flows_full, True, False),
    ("map of direct connections full", direct_flows_full, True, False),
]
CHOSEN = [row[:3] for row in DRILLS if LONG or row[3]]


@pytest.mark.parametrize(("name", "break_it", "survives"), CHOSEN, ids=[row[0] for row in CHOSEN])
def test_what_is_taken_out_of_the_kernel_is_put_back_and_nothing_goes_plain(
    ground: Ground, name: str, break_it: Callable[[Ground], float | None], survives: bool
) -> None:
    run_drill(ground, name, break_it, survives=survives, patience_seconds=PATIENCE_SECONDS)


def test_filter_of_the_guard_is_put_back(ground: Ground, tmp_path: Path) -> None:
    """An agent that takes the kernel for one before tcx guards by filters of tc."""
    for part in ("agent", "bpf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    features = tmp_path / "agent/datapath/features.py"
    text = features.read_text()
    changed = re.sub(r"(?m)^TCX_KERNEL = .*$", "TCX_KERNEL = (999, 0)", text)
    assert changed != text
    features.write_text(changed)
    lab, east = ground.lab, ground.nodes[0]
    link = f"pod{lab.find_pod('client').number}"

    def tc(*command: str) -> str:
        fd = netns.open_netns(lab.node_netns(east))
        try:
            return netns.run_in(fd, lambda: _run("tc", "filter", *command))
        finally:
            os.close(fd)

    def filters_deleted(_ground: Ground) -> float:
        assert "ss_guard_out" in tc("show", "dev", link, "ingress")
        began = time.monotonic()
        for parent in ("ingress", "egress"):
            tc("del", "dev", link, parent)
        return wait_mended(
            lambda: all(
                "ss_guard" in tc("show", "dev", link, way) for way in ("ingress", "egress")
            ),
            began,
        )

    with ExitStack() as stack:
        lab.label_namespace("shop", None)
        lab.upgrade_agent(east, tmp_path)
        lab.label_namespace("shop", "ambient")
        stack.callback(lab.label_namespace, "shop", "ambient")
        stack.callback(lab.upgrade_agent, east)
        stack.callback(lab.label_namespace, "shop", None)
        run_drill(
            ground,
            "guard's tc filters deleted",
            filters_deleted,
            survives=True,
            patience_seconds=PATIENCE_SECONDS,
        )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

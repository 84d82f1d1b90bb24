"""What `sidestep check` sees of this machine's kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from agent.datapath import features, links

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


def check(mounts: Path, directory: Path) -> features.Check:
    """Look at the machine as a process with `mounts` does."""
    (directory / "sys").symlink_to("/sys")
    (directory / "proc/self").mkdir(parents=True)
    (directory / "proc/self/mounts").write_text(f"none {mounts} cgroup2 rw 0 0\n")
    return features._check_cgroup(directory)


def test_root_of_the_hierarchy_is_known(tmp_path: Path) -> None:
    assert check(links.cgroup_root(), tmp_path).is_ok


def test_part_of_the_hierarchy_is_refused(tmp_path: Path) -> None:
    made = links.cgroup_root() / f"sidestep-test-{os.getpid()}"
    made.mkdir()
    try:
        found = check(made, tmp_path)
    finally:
        made.rmdir()
    assert not found.is_ok
    assert found.detail == f"{made} is a part of the hierarchy, not its root"

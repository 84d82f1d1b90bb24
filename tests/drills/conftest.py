"""One lab for all drills; the report is written when they are over."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.lab.lab import DEFAULT_CLUSTER, Lab
from tests.drills import report
from tests.drills.ground import REPORT, Ground
from tests.support.damage import mount_bpffs, unmount

if TYPE_CHECKING:
    from collections.abc import Iterator


# The run directory is a file system of its own, which a drill can fill.
DISK = ("-t", "tmpfs", "-o", "size=192m,nr_inodes=4k,mode=700", "tmpfs")


@pytest.fixture(scope="package")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    lab = Lab(f"t{os.getpid()}")
    lab.run.mkdir(parents=True)
    subprocess.run(["mount", *DISK, str(lab.run)], check=True)
    lab.pins = tmp_path_factory.mktemp("bpf")  # of its own: one that may be unmounted
    mount_bpffs(lab.pins)
    try:
        lab.up(DEFAULT_CLUSTER, print)
        lab.label_namespace("shop", "ambient")
        found = Ground(lab)
        yield found
        if REPORT is not None:
            report.write(Path(REPORT), found.rows)
    finally:
        lab.down()
        subprocess.run(["umount", str(lab.run)], check=True)
        lab.down()  # the place of the disk, too
        unmount(lab.pins)

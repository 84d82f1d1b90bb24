"""One lab for all drills; the report is written when they are over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.lab.lab import DEFAULT_CLUSTER, Lab
from tests.drills import report
from tests.drills.ground import REPORT, Ground
from tests.support.damage import mount_bpffs, unmount

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    lab = Lab(f"t{os.getpid()}")
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
        unmount(lab.pins)

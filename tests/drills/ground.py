"""What a drill needs: the lab that all share, traffic, and a look at what became of it.

Two kinds of traffic run: from node to node by tunnel, and within a node directly. A raw socket on
the link between the nodes looks for the applications' ports, which only plaintext shows.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.drills.report import Row
from tests.drills.sniffer import Sniffer
from tests.support.labs import SECONDS, PodEnd
from tests.support.load import Load
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.lab.cluster import LabNode
    from agent.lab.lab import Lab

REPORT = os.environ.get("DRILLS_REPORT")  # where the table goes; also asks for the long form
LONG = REPORT is not None
WHOLE_SECONDS = 30.0


@dataclass
class Ground:
    """The lab that all drills share, and what they have seen."""

    lab: Lab
    rows: list[Row] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[LabNode, LabNode]:
        east, west = self.lab.cluster().nodes
        return east, west


def run_drill(
    ground: Ground,
    name: str,
    break_it: Callable[[Ground], float | None],
    *,
    survives: bool,
    patience_seconds: float = SECONDS,
) -> None:
    """Break something while traffic runs, and see it whole again with nothing sent in plaintext.

    `break_it` returns when the cause is gone; or when the agent has mended what was broken, and
    then the moment of the damage. `survives` says that open connections by tunnel must, and new
    ones give up after `patience_seconds`.
    """
    lab = ground.lab
    with ExitStack() as stack:
        sniffer = Sniffer(lab, ground.nodes[1], stack)
        client, cache = PodEnd(lab, "client", stack), PodEnd(lab, "cache", stack)
        far = Load(client, PodEnd(lab, "server", stack), stack, patience_seconds)
        near = Load(client, cache, stack, patience_seconds)
        far.start(streams=2, has_bulk=False)
        near.start(streams=0, has_bulk=False)
        wait_good(far, time.monotonic(), 20)
        wait_good(near, time.monotonic(), 20)
        far.connects.failed.clear()
        near.connects.failed.clear()
        since = break_it(ground)
        mended = time.monotonic()
        for load in (far, near):
            wait_good(load, mended, WHOLE_SECONDS)
        since = mended if since is None else since
        whole = max(load.connects.longest_wait(since) for load in (far, near))
        whole = max(whole, mended - since)
        far.stop()
        near.stop()
        assert sniffer.seen > 0
        ground.rows.append(
            Row(
                name,
                said(len(far.connects.failed), "refused or reset", far.connects.gap()),
                "cut" if far.streams.failed else f"go on, longest pause {far.streams.gap():.1f} s",
                said(len(near.connects.failed), "refused", near.connects.gap()),
                max(whole, 0.0),
                sniffer.plaintext,
            )
        )
        assert sniffer.plaintext == 0
        assert not survives or not far.streams.failed


def said(failed: int, how: str, gap: float) -> str:
    """Say how new connections fared."""
    return f"{how} for {gap:.1f} s" if failed else f"all, longest pause {gap:.1f} s"


def wait_good(load: Load, since: float, seconds: float) -> None:
    """Wait until a connection has succeeded after `since`."""
    wait_until(
        lambda: any(moment > since for moment in load.connects.good[-50:]),
        seconds,
        what=lambda: load.connects.failed[-3:],
    )


def pause(seconds: float) -> None:
    """Let what is broken be broken for a while."""
    threading.Event().wait(seconds)

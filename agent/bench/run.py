"""The rounds: every cell on every way, then the next cell, then the next round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from agent.bench.ground import Ground
from agent.bench.measures import Cells, Plan, measure_memory
from agent.bench.results import Sample, build_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.bench.tools import Tools
    from agent.lab.lab import Lab
    from agent.output import Row

MEASURED_IDLE = ("cross-node", "envoy", "ztunnel")  # the direct path has no process of ours in it


def run(lab: Lab, tools: Tools, plan: Plan, say: Callable[[str], None]) -> list[Row]:
    """Bring up `lab`, measure, take it down, and return the rows."""
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory(prefix="sidestep-bench-") as directory,
        Ground(lab, tools, Path(directory), plan) as ground,
    ):
        say(f"lab {lab.name} is up")
        for way in ground.ways:
            # Before the rounds: memory that load has left behind would hide what idle ones take.
            if "memory" in plan.measures and way.place.path in MEASURED_IDLE:
                samples += measure_memory(ground, way, plan.idle_connections)
        cells = Cells(ground, plan)
        for number in range(plan.rounds):
            say(f"round {number + 1} of {plan.rounds}")
            for cell in cells.all:
                for way in ground.ways:
                    samples += cell(way)
    return build_rows(samples)

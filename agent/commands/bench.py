"""`sidestep bench`: what the mesh costs on this machine, beside no mesh and beside Envoy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from agent.bench import tools
from agent.bench.measures import MEASURES, PATHS, QUICK, Plan
from agent.bench.plot import draw
from agent.bench.run import run
from agent.commands.examples import examples
from agent.lab.lab import Lab
from agent.output import Output, Row, emit, output_option

COLUMNS = (
    "path", "measure", "parameters", "value", "spread", "ratio_to_no_mesh", "ratio_to_envoy",
)  # fmt: skip


@click.command(
    epilog=examples(
        "sidestep bench --quick",
        "sidestep bench --path same-node --measure round-trip -o json",
        "sidestep bench --plot bench.png",
        "sidestep bench --ztunnel /usr/local/bin/ztunnel",
    )
)
@click.option("--quick", is_flag=True, help="Short cells: under a minute, and more noise.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Interleaved rounds.")
@click.option("--seconds", type=click.FloatRange(0.05, 60), help="Length of one cell.")
@click.option("--idle", type=click.IntRange(100, 20_000), help="Idle connections to hold.")
@click.option(
    "--path", "paths", type=click.Choice(PATHS), multiple=True, help="Only these paths (repeat)."
)
@click.option(
    "--measure",
    "measures",
    type=click.Choice(MEASURES),
    multiple=True,
    help="Only these measures (repeat).",
)
@click.option(
    "--ztunnel", type=click.Path(path_type=Path, dir_okay=False), metavar="BINARY",
    help="Measure a pair of ztunnels as well; needs nft.",
)  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a PNG here.")
@click.option("--name", default="bench", show_default=True, help="Name of the lab that is used.")
@output_option
def bench(
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    idle: int | None,
    paths: tuple[str, ...],
    measures: tuple[str, ...],
    ztunnel: Path | None,
    plot: Path | None,
    name: str,
    output: Output,
) -> None:
    """Measure latency, throughput, processor time and memory of the mesh on this machine.

    A lab of two nodes comes up, with a pair of Envoys that speak the same protocol in the same
    place. All paths are measured in turn in one run; read the ratios, not the numbers of two runs.
    """
    base = QUICK if quick else Plan()
    plan = replace(
        base,
        rounds=rounds or base.rounds,
        seconds=seconds or base.seconds,
        idle_connections=idle or base.idle_connections,
        paths=(paths or base.paths) + (("ztunnel",) if ztunnel else ()),
        measures=measures or base.measures,
    )
    found = tools.find_tools(has_envoy="envoy" in plan.paths, ztunnel=ztunnel)
    versions = ", ".join(f"{key} {value}" for key, value in found.versions().items())
    click.echo(versions, err=True)
    rows = run(Lab(name), found, plan, lambda line: click.echo(f"  {line}", err=True))
    emit(rows if output != "table" else [_flat(row) for row in rows], COLUMNS, output)
    if plot is not None:
        draw(rows, plot, f"medians of {plan.rounds} rounds of {plan.seconds} s: {versions}")
        click.echo(f"plot: {plot}", err=True)


def _flat(row: Row) -> Row:
    parameters = row["parameters"]
    assert isinstance(parameters, dict)
    given = " ".join(f"{name}={value}" for name, value in parameters.items())
    numbers = {
        name: None if row[name] is None else f"{row[name]:g}"
        for name in ("value", "spread", "ratio_to_no_mesh", "ratio_to_envoy")
    }
    return row | {"parameters": given} | numbers

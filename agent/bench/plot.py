"""Rows to a picture: one panel for each measure, one bar for each path."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from agent.bench.results import row_key
from agent.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path

    from agent.output import Row

TITLE_COLUMNS = 180  # as many letters as the picture is wide
COLORS = {
    "no-mesh": "#9aa0a6",
    "same-node": "#34a0a4",
    "cross-node": "#1a5fb4",
    "envoy": "#c64600",
    "ztunnel": "#9141ac",
}
UNITS = {
    "rtt_p50_us": "us, lower is better",
    "rtt_p99_us": "us, lower is better",
    "requests_per_second": "higher is better",
    "bulk_gbit_s": "Gbit/s, higher is better",
    "connections_per_second": "higher is better",
    "cpu_s_per_gb": "lower is better",
    "cpu_s_per_1000_requests": "lower is better",
    "rss_mib": "MiB, lower is better",
    "idle_kib_per_connection": "KiB, lower is better",
}
COLUMNS = 4


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Write a PNG (LabError without matplotlib)."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise LabError("matplotlib is missing: `make bench` installs it") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(row_key(row), []).append(row)
    lines = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(4 * COLUMNS, 2.6 * lines))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (key, group) in zip(axes.flat, panels.items(), strict=False):
        measure, *parameters = key
        given = str(parameters).translate(str.maketrans("", "", "[](),'"))
        axis.set_title(f"{str(measure).replace('_', ' ')}\n{given}", fontsize=8)
        axis.set_xlabel(UNITS[str(measure)], fontsize=7)
        axis.tick_params(labelsize=7)
        labels = [_label(row) for row in group]
        values = [float(str(row["value"])) for row in group]
        errors = [
            value * float(str(row["spread"])) / 2 for value, row in zip(values, group, strict=True)
        ]
        bars = axis.barh(
            labels, values, color=[COLORS[str(row["path"])] for row in group], xerr=errors
        )
        axis.bar_label(bars, [f"{value:.4g}" for value in values], fontsize=7, padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.2)
    figure.suptitle(fill(title, TITLE_COLUMNS), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _label(row: Row) -> str:
    parameters = row["parameters"]
    assert isinstance(parameters, dict)
    return f"{row['path']}, one node" if "nodes" in parameters else str(row["path"])

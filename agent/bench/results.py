"""Samples to rows: the median of the rounds, their spread, and what others have beside it. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

Parameters = dict[str, int]
Key = tuple[str, tuple[tuple[str, int], ...]]
PathName = Literal["no-mesh", "same-node", "cross-node", "envoy", "ztunnel"]


class Place(NamedTuple):
    """A path, and whether both of its pods are on one node."""

    path: PathName
    is_local: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of one round."""

    place: Place
    measure: str
    parameters: Parameters
    value: float


def _ratio(value: float, other: float | None) -> float | None:
    return round(value / other, 3) if other else None


def build_rows(samples: Iterable[Sample]) -> list[dict[str, object]]:
    """Return one row for each path, measure and parameters, in the order of the first samples.

    `spread` is the distance of the best and the worst round in parts of the median.
    """
    values: dict[tuple[Key, Place], list[float]] = {}
    for sample in samples:
        key = sample.measure, tuple(sorted(sample.parameters.items()))
        values.setdefault((key, sample.place), []).append(sample.value)
    medians = {where: statistics.median(found) for where, found in values.items()}
    rows: list[dict[str, object]] = []
    for (key, place), found in values.items():
        path, is_local = place
        value = medians[key, place]
        parameters = dict(key[1])
        if path == "no-mesh" and is_local:
            parameters["nodes"] = 1
        plain = medians.get((key, Place("no-mesh", is_local)))
        envoy = None if is_local else medians.get((key, Place("envoy", False)))
        rows.append(
            {
                "path": path,
                "measure": key[0],
                "parameters": parameters,
                "value": float(f"{value:.4g}"),
                "spread": round((max(found) - min(found)) / value, 3) if value else 0.0,
                "ratio_to_no_mesh": _ratio(value, plain),
                "ratio_to_envoy": _ratio(value, envoy),
            }
        )
    first = {row_key(row): number for number, row in reversed(list(enumerate(rows)))}
    return sorted(rows, key=lambda row: first[row_key(row)])


def row_key(row: dict[str, object]) -> tuple[object, ...]:
    """Return what rows of different paths have in common."""
    parameters = row["parameters"]
    assert isinstance(parameters, dict)
    return row["measure"], *sorted(item for item in parameters.items() if item[0] != "nodes")

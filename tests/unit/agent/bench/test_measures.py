"""Which paths a run compares, from what was asked for."""

from __future__ import annotations

import pytest

from agent.bench.measures import Plan
from agent.bench.results import Place

NEAR, FAR = Place("no-mesh", True), Place("no-mesh", False)


@pytest.mark.parametrize(
    ("paths", "beside"),
    [
        (("no-mesh", "same-node"), [NEAR]),
        (("no-mesh", "cross-node"), [FAR]),
        (("no-mesh", "envoy"), [FAR]),
        (("no-mesh",), [NEAR, FAR]),
        (("same-node",), []),
    ],
)
def test_path_is_measured_beside_what_it_is_compared_with(
    paths: tuple[str, ...], beside: list[Place]
) -> None:
    plan = Plan(paths=paths)
    assert [place for place in (NEAR, FAR) if plan.has_place(place)] == beside
    assert plan.has_place(Place("same-node", True)) == ("same-node" in paths)


def test_everything_is_measured_if_nothing_is_said() -> None:
    places = [NEAR, FAR, Place("same-node", True), Place("cross-node", False)]
    assert all(map(Plan().has_place, [*places, Place("envoy", False)]))

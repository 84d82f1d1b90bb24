"""Rows of the benchmark: medians, spread, and who is compared with whom."""

from __future__ import annotations

from agent.bench.results import Place, Sample, build_rows

NEAR, FAR = Place("no-mesh", is_local=True), Place("no-mesh", is_local=False)
LOCAL = Place("same-node", is_local=True)
OURS, ENVOY = Place("cross-node", is_local=False), Place("envoy", is_local=False)


def row(place: Place, values: list[float]) -> dict[str, object]:
    """Build the row of `place` beside fixed values of the others."""
    samples = [Sample(place, "bulk_gbit_s", {"streams": 1}, value) for value in values]
    for other, value in ((NEAR, 40.0), (FAR, 20.0), (ENVOY, 5.0)):
        if other != place:
            samples.append(Sample(other, "bulk_gbit_s", {"streams": 1}, value))
    return build_rows(samples)[0]


def test_value_is_the_median_and_spread_is_relative() -> None:
    found = row(OURS, [10.0, 8.0, 50.0, 10.0, 9.0])
    assert found["value"] == 10.0
    assert found["spread"] == 4.2


def test_cross_node_compares_with_no_mesh_across_nodes_and_with_envoy() -> None:
    found = row(OURS, [10.0])
    assert (found["ratio_to_no_mesh"], found["ratio_to_envoy"]) == (0.5, 2.0)


def test_same_node_compares_with_no_mesh_on_one_node_only() -> None:
    found = row(LOCAL, [10.0])
    assert (found["ratio_to_no_mesh"], found["ratio_to_envoy"]) == (0.25, None)


def test_no_mesh_on_one_node_is_told_apart_by_its_parameters() -> None:
    assert row(NEAR, [40.0])["parameters"] == {"streams": 1, "nodes": 1}
    assert row(FAR, [20.0])["parameters"] == {"streams": 1}


def test_rows_of_one_measure_stand_together() -> None:
    samples = [
        Sample(place, measure, {}, 1.0)
        for place in (FAR, ENVOY)
        for measure in ("rtt_p50_us", "rtt_p99_us")
    ]
    measures = [found["measure"] for found in build_rows(samples)]
    assert measures == ["rtt_p50_us", "rtt_p50_us", "rtt_p99_us", "rtt_p99_us"]

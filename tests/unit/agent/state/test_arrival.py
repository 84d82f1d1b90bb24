"""What a node knows of its pods before the API server does."""

from __future__ import annotations

from ipaddress import ip_address

from agent.model.pod import LocalPod
from agent.model.starting import StartingPod
from agent.model.workload import Workload
from agent.state.arrival import complete, find_pod, pods_of
from agent.state.store import Snapshot

HERE, THERE = "node-1", "node-2"


def pod(uid: str, last: int | None = None, node: str = HERE, *, wants: bool = True) -> StartingPod:
    addresses = () if last is None else (ip_address(f"10.0.0.{last}"),)
    workload = Workload(uid, "shop", f"pod-{uid}", node, "cart", addresses, is_hbone=False)
    local = LocalPod(uid, "shop", f"pod-{uid}", "cart", addresses) if wants else None
    return StartingPod(workload, local)


def state(*pods: StartingPod, starting: tuple[StartingPod, ...] = ()) -> Snapshot:
    local: dict[str, tuple[LocalPod, ...]] = {}
    for each in pods:
        if each.local is not None:
            local[each.node] = (*local.get(each.node, ()), each.local)
    return Snapshot(tuple(each.workload for each in pods), local_pods=local, starting=starting)


BEFORE = state(
    pod("a", 1), pod("c", 3, wants=False), pod("d", 4, THERE), starting=(pod("b"), pod("e"))
)


def test_pod_that_arrives_is_where_its_sandbox_is() -> None:
    found = complete(BEFORE, HERE, [pod("b", 2)])
    assert found == state(
        pod("a", 1), pod("b", 2), pod("c", 3, wants=False), pod("d", 4, THERE),
        starting=(pod("e"),),
    )  # fmt: skip


def test_address_of_a_new_sandbox_counts_and_not_that_of_the_old_one() -> None:
    assert complete(BEFORE, HERE, [pod("a", 9)]).workloads[0].addresses == (ip_address("10.0.0.9"),)
    assert complete(BEFORE, HERE, [pod("c", 9, wants=False)]).local_pods == BEFORE.local_pods


def test_pod_whose_sandbox_ended_is_not_there() -> None:
    found = complete(BEFORE, HERE, [], {"a", "e"})
    assert {each.uid for each in found.workloads} == {"c", "d"}
    assert found.local_pods[HERE] == ()
    assert found.local_pods[THERE] == BEFORE.local_pods[THERE]
    assert found.starting == (pod("b"),)


def test_state_without_news_is_the_same() -> None:
    assert complete(BEFORE, HERE, []) is BEFORE


def test_pods_of_a_node_are_found_with_and_without_addresses() -> None:
    expected = {"a": pod("a", 1), "b": pod("b"), "c": pod("c", 3, wants=False), "e": pod("e")}
    assert pods_of(BEFORE, HERE) == expected
    for uid, each in expected.items():
        assert find_pod(BEFORE, HERE, lambda found, _space, _name, uid=uid: found == uid) == each  # type: ignore[misc]  # the default binds it
    assert find_pod(BEFORE, HERE, lambda uid, _space, _name: uid == "d") is None
    assert find_pod(BEFORE, THERE, lambda uid, _space, _name: uid == "b") is None

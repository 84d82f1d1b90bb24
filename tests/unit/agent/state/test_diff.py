"""The steps from observed to desired pods, and their order."""

from __future__ import annotations

from ipaddress import ip_address

from agent.model.pod import LocalPod
from agent.state.diff import Enroll, Unenroll, diff


def pod(uid: str, name: str = "cart") -> LocalPod:
    return LocalPod(uid, "shop", name, "cart", (ip_address("10.0.0.1"),))


def by_uid(*pods: LocalPod) -> dict[str, LocalPod]:
    return {each.uid: each for each in pods}


def test_nothing_to_do_gives_no_step() -> None:
    assert diff({}, {}) == ()
    assert diff(by_uid(pod("a")), by_uid(pod("a"))) == ()


def test_leaving_pods_come_first_then_changed_then_new_ones_each_in_order() -> None:
    desired = by_uid(pod("z"), pod("n"), pod("c", "new"), pod("b", "new"), pod("k"))
    observed = by_uid(pod("y"), pod("x"), pod("c"), pod("b"), pod("k"))
    assert diff(desired, observed) == (
        Unenroll("x"),
        Unenroll("y"),
        Unenroll("b"),
        Enroll(pod("b", "new")),
        Unenroll("c"),
        Enroll(pod("c", "new")),
        Enroll(pod("n")),
        Enroll(pod("z")),
    )

"""Admissions: judged at the door, again at each change, and never by half of one."""

from __future__ import annotations

from ipaddress import ip_address

from agent.model.condition import Connection
from agent.model.identity import SpiffeId
from agent.model.verdict import Basis, Verdict
from agent.model.workload import Workload
from agent.tunnel.gate import Gate
from agent.tunnel.mesh import Mesh
from tests.support.policies import authorization, from_account

POD = Workload("u", "default", "pod", "n", "pod", (ip_address("10.0.0.2"),), is_hbone=True)
CONNECTION = Connection(
    ip_address("10.0.0.1"), SpiffeId("td", "default", "client"), ip_address("10.0.0.2"), 80
)
DENY = authorization("deny", "DENY", from_account("client"))


def gate_of(*workloads: Workload) -> Gate:
    mesh = Mesh()
    for workload in workloads:
        mesh.put_workload(workload)
    return Gate(mesh)


def test_change_revokes_once_and_not_before_all_of_it_is_there() -> None:
    gate = gate_of(POD)
    admission = gate.admit("u", CONNECTION)
    assert admission.verdict.is_allowed
    revoked: list[Verdict] = []
    admission.on_revoked = revoked.append
    gate.put([DENY])
    assert revoked == []
    assert gate.enforce() == 1
    gate.enforce()
    assert [verdict.policy for verdict in revoked] == [DENY.key]
    assert admission.verdict is revoked[0]
    assert not gate.admit("u", CONNECTION).verdict.is_allowed
    gate.remove([DENY.key])
    gate.enforce()
    assert gate.admit("u", CONNECTION).verdict.is_allowed


def test_ended_connection_is_not_revoked() -> None:
    gate = gate_of(POD)
    first, second = gate.admit("u", CONNECTION), gate.admit("u", CONNECTION)
    second.end()
    gate.put([DENY])
    revoked: list[str] = []
    first.on_revoked = lambda _verdict: revoked.append("first")
    second.on_revoked = lambda _verdict: revoked.append("second")
    gate.enforce()
    assert revoked == ["first"]


def test_closing_one_may_end_another() -> None:
    gate = gate_of(POD)
    first, second = gate.admit("u", CONNECTION), gate.admit("u", CONNECTION)
    first.on_revoked = lambda _verdict: second.end()
    revoked: list[Verdict] = []
    second.on_revoked = revoked.append
    gate.put([DENY])
    gate.enforce()
    assert revoked == []


def test_connection_that_nobody_closes_yet_is_denied_all_the_same() -> None:
    gate = gate_of(POD)
    admission = gate.admit("u", CONNECTION)
    gate.put([DENY])
    gate.enforce()
    assert not admission.verdict.is_allowed


def test_unknown_pod_lets_nobody_in() -> None:
    assert gate_of().admit("u", CONNECTION).verdict.basis is Basis.NO_WORKLOAD


def test_open_connections_are_counted_until_each_has_ended_once() -> None:
    gate = gate_of(POD)
    ended: list[str] = []
    gate.on_ended = ended.append
    first, second = gate.admit("u", CONNECTION), gate.admit("u", CONNECTION)
    assert gate.open_connections("u") == 2
    first.end()
    first.end()
    assert gate.open_connections("u") == 1
    second.end()
    assert gate.open_connections("u") == 0
    assert ended == ["u", "u"]

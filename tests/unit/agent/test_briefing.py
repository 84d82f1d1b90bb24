"""What workers are told: all of a state, or what is new in it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from agent.briefing import changes, introduce
from agent.model.service import Service, ServicePort
from agent.model.workload import Workload
from agent.state.store import Snapshot
from agent.tunnel.messages import PutService, PutWorkload, RemoveService, RemoveWorkload

WEB = Workload("uid-web", "shop", "web", "east", "web", (ip_address("10.0.0.1"),), True)
CART = replace(WEB, uid="uid-cart", name="cart", addresses=(ip_address("10.0.0.2"),))
SERVICE = Service("shop", "web", (ip_address("10.96.0.1"),), (ServicePort("", 80),), ())


def test_same_state_says_nothing() -> None:
    state = Snapshot(workloads=(WEB,), services=(SERVICE,))
    assert list(changes(state, state)) == []


def test_new_worker_is_told_all() -> None:
    state = Snapshot(workloads=(WEB, CART), services=(SERVICE,))
    assert list(introduce(state)) == [PutWorkload(WEB), PutWorkload(CART), PutService(SERVICE)]


def test_address_that_changed_hands_is_taken_before_it_is_given() -> None:
    heir = replace(CART, addresses=WEB.addresses)
    told = list(changes(Snapshot(workloads=(WEB,)), Snapshot(workloads=(heir,))))
    assert told == [RemoveWorkload(WEB.uid), PutWorkload(heir)]


def test_service_that_changed_is_told_and_one_that_is_gone_is_taken() -> None:
    other = replace(SERVICE, name="other")
    moved = replace(SERVICE, addresses=(ip_address("10.96.0.9"),))
    told = list(changes(Snapshot(services=(SERVICE, other)), Snapshot(services=(moved,))))
    assert told == [RemoveService("shop", "other"), PutService(moved)]

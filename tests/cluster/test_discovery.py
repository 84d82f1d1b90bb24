"""The source against a real API server: what is followed, and what disturbs nothing."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from agent.discovery import kubernetes
from agent.discovery.api import Api
from agent.discovery.kubernetes import KubernetesSource
from agent.discovery.translate import EXCLUDE_OUTBOUND_PORTS, READERS
from agent.model.enrollment import MODE_LABEL
from agent.model.workload import NOWHERE, Locality
from tests.support.cluster_objects import (
    definition,
    endpoint_slice,
    enrolled,
    following,
    machine,
    names,
    namespace,
    pod,
    policy,
    service,
    service_entry,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from agent.state.store import Snapshot
    from tests.support.api_server import ApiServer

POLICY_KINDS = (
    ("AuthorizationPolicy", "authorizationpolicies"),
    ("PeerAuthentication", "peerauthentications"),
)
ENTRY_KINDS = (("ServiceEntry", "serviceentries"), ("WorkloadEntry", "workloadentries"))


def source_of(server: ApiServer, token: str = "admin") -> KubernetesSource:
    return KubernetesSource(Api(server.configuration(token)))


@pytest.fixture
def policy_kinds(api_server: ApiServer) -> Iterator[None]:
    """Install the definitions of policies; gone at the end."""
    for kind, plural in POLICY_KINDS:
        api_server.apply(definition(kind, plural))
    yield
    for kind, plural in POLICY_KINDS:
        api_server.delete(definition(kind, plural))


def has_enrolled(space: str, expected: set[str], snapshot: Snapshot) -> bool:
    return enrolled(snapshot, space) == expected


class WatchedApi(Api):
    """Remembers what was asked of it."""

    def __init__(self, server: ApiServer) -> None:
        super().__init__(server.configuration())
        self.asked: list[tuple[str, str]] = []
        self.has_watched_again = threading.Event()

    def get(
        self,
        path: str,
        query: Mapping[str, str],
        read_seconds: float = 15.0,
        accept: str = "application/json",
    ) -> Any:
        verb = "watch" if "watch" in query else "list"
        self.asked.append((verb, path))
        if self.asked.count(("watch", "/api/v1/pods")) == 3:
            self.has_watched_again.set()
        return super().get(path, query, read_seconds, accept)


def test_every_kind_that_the_translator_reads_is_followed() -> None:
    followed = {
        (version, resource.kind)
        for resource in kubernetes.RESOURCES
        for version in resource.versions
    }
    assert followed == set(READERS)


def test_pods_are_known_to_be_where_the_labels_of_their_node_say(api_server: ApiServer) -> None:
    labels = {"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1"}
    bare = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}
    placed = bare | {"metadata": {"name": "node-1", "labels": labels}}
    api_server.apply(namespace("places"))
    api_server.apply(pod("places/a", "10.7.0.1"))
    api_server.apply(placed)

    def are_at(locality: Locality, snapshot: Snapshot) -> bool:
        found = {each.locality for each in snapshot.workloads if each.namespace == "places"}
        return found == {locality}

    async def run() -> None:
        async with following(source_of(api_server)) as seen:
            await seen.until(partial(are_at, Locality("eu", "eu-1")))  # from the list
            api_server.apply(bare)
            await seen.until(partial(are_at, NOWHERE))  # from the watch
            api_server.apply(placed)
            await seen.until(partial(are_at, Locality("eu", "eu-1")))
            api_server.delete(bare)
            await seen.until(partial(are_at, NOWHERE))

    asyncio.run(run())


def test_created_changed_and_deleted_objects_are_followed(api_server: ApiServer) -> None:
    async def run() -> None:
        async with following(source_of(api_server)) as seen:
            api_server.apply(namespace("shop"))
            for name in ("a", "b"):
                api_server.apply(pod(f"shop/{name}", f"10.0.0.{ord(name)}"))
            await seen.until(lambda snapshot: enrolled(snapshot, "shop") == {"a", "b"})
            api_server.apply(service("shop", "web"))
            api_server.apply(endpoint_slice("shop", "web", "10.0.0.97", "10.0.0.98"))
            await seen.until(lambda snapshot: endpoints(snapshot) == ["10.0.0.97", "10.0.0.98"])
            api_server.apply(endpoint_slice("shop", "web", "10.0.0.98"))
            await seen.until(lambda snapshot: endpoints(snapshot) == ["10.0.0.98"])
            api_server.delete(pod("shop/a", ""))
            await seen.until(lambda snapshot: names(snapshot, "shop") == {"b"})
            ended = pod("shop/b", "10.0.0.98")
            ended["status"]["phase"] = "Succeeded"
            api_server.apply(ended)
            await seen.until(lambda snapshot: names(snapshot, "shop") == set())

    def endpoints(snapshot: Snapshot) -> list[str]:
        return [
            str(endpoint.address)
            for each in snapshot.services
            if each.namespace == "shop"
            for endpoint in each.endpoints
        ]

    asyncio.run(run())


def test_labels_are_in_force_within_a_second(
    api_server: ApiServer, measured: Callable[[str], None]
) -> None:
    took = []

    async def run() -> None:
        async with following(source_of(api_server)) as seen:
            api_server.apply(namespace("labels", None))
            api_server.apply(pod("labels/a", "10.1.0.1"))
            await seen.until(lambda snapshot: names(snapshot, "labels") == {"a"})
            assert enrolled(seen.latest, "labels") == set()
            steps = (
                (namespace("labels"), True),
                (pod("labels/a", "10.1.0.1", {MODE_LABEL: "none"}), False),
                (pod("labels/a", "10.1.0.1", {MODE_LABEL: "ambient"}), True),
                (namespace("labels", None), True),
                (pod("labels/a", "10.1.0.1"), False),
            )
            for body, is_in in steps:
                began = time.monotonic()
                api_server.apply(body)
                expected = {"a"} if is_in else set()
                await seen.until(partial(has_enrolled, "labels", expected))
                took.append(time.monotonic() - began)

    asyncio.run(run())
    assert max(took) < 1.0
    measured(f"a label is seen by the agent after {max(took) * 1000:.0f} ms at most")


def test_server_that_was_away_while_objects_changed_is_listed_again_and_nothing_goes_meanwhile(
    api_server: ApiServer, second_server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    second_server.start()

    async def run() -> None:
        api_server.apply(namespace("away"))
        for name in ("stays", "leaves"):
            api_server.apply(pod(f"away/{name}", f"10.2.0.{len(name)}"))
        async with following(source_of(api_server)) as seen:
            await seen.until(lambda snapshot: len(enrolled(snapshot, "away")) == 2)
            api_server.kill()
            # The server that starts knows nothing of what was before, so the old version is gone.
            second_server.delete(pod("away/leaves", ""))
            second_server.apply(pod("away/comes", "10.2.0.9"))
            assert len(seen.snapshots) == 1
            api_server.start()
            await seen.until(lambda snapshot: names(snapshot, "away") == {"stays", "comes"})
            assert all("stays" in enrolled(each, "away") for each in seen.snapshots)

    asyncio.run(run())
    listed_again = [each for each in caplog.records if each.message == "list again"]
    assert "Pod" in {vars(each)["kind"] for each in listed_again}


def test_watch_that_ended_goes_on_where_it_was(
    api_server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.discovery.follow.WATCH_SECONDS", (2, 2))
    api = WatchedApi(api_server)

    async def run() -> None:
        api_server.apply(namespace("again"))
        async with following(KubernetesSource(api)) as seen:
            await asyncio.to_thread(api.has_watched_again.wait, 20.0)
            api_server.apply(pod("again/a", "10.3.0.1"))
            await seen.until(lambda snapshot: enrolled(snapshot, "again") == {"a"})

    asyncio.run(run())
    assert api.asked.count(("list", "/api/v1/pods")) == 1
    assert api.asked.count(("watch", "/api/v1/pods")) >= 3


def test_agent_that_starts_first_waits_for_the_server(second_server: ApiServer) -> None:
    async def run() -> None:
        second_server.start()  # for its certificate
        second_server.kill()
        async with following(source_of(second_server)) as seen:
            assert seen.snapshots == []
            await asyncio.to_thread(second_server.start)
            await seen.until(lambda _snapshot: True)

    asyncio.run(run())


def test_policies_are_followed_when_their_kind_appears(
    api_server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.discovery.follow.ABSENT_SECONDS", 0.2)

    async def run() -> None:
        async with following(source_of(api_server)) as seen:
            await seen.until(lambda snapshot: snapshot.policies == ())
            for kind, plural in POLICY_KINDS:
                api_server.apply(definition(kind, plural))
            api_server.apply(namespace("late"))
            api_server.apply_when_served(policy("late", "p"))
            await seen.until(lambda snapshot: len(snapshot.policies) == 1)
            for kind, plural in POLICY_KINDS:
                api_server.delete(definition(kind, plural))
            await seen.until(lambda snapshot: snapshot.policies == ())

    asyncio.run(run())


def test_machines_and_their_services_are_followed_when_their_kinds_appear(
    api_server: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("agent.discovery.follow.ABSENT_SECONDS", 0.2)
    monkeypatch.setattr("agent.discovery.follow.BELIEVED_ABSENT_SECONDS", 1.0)
    source = source_of(api_server)
    definitions = [definition(*each, "networking.istio.io") for each in ENTRY_KINDS]
    vip = ip_address("192.0.2.100")

    def endpoints(snapshot: Snapshot, name: str = "db") -> list[str]:
        found = [each for each in snapshot.services if each.name == name]
        return [f"{address}:{port}" for each in found for address, port in each.endpoints_for(5432)]

    async def run() -> None:
        api_server.apply(namespace("machines", None))
        async with following(source) as seen:
            await seen.until(lambda snapshot: names(snapshot, "machines") == set())
            for body in definitions:
                api_server.apply(body)
            vm = machine("machines", "vm", "192.0.2.1", app="db")
            api_server.apply_when_served(vm)
            await seen.until(lambda snapshot: names(snapshot, "machines") == {"vm"})
            selecting = {"workloadSelector": {"labels": {"app": "db"}}, "addresses": [str(vip)]}
            api_server.apply_when_served(service_entry("machines", "db", **selecting))
            found = await seen.until(lambda found: endpoints(found) == ["192.0.2.1:5432"])
            (service,) = (each for each in found.services if each.name == "db")
            assert (service.addresses, service.hosts) == ((vip,), ("db.example.com",))
            # A pod with the label joins, and the machine moves to another port.
            api_server.apply(pod("machines/db-0", "10.10.0.1", {"app": "db"}))
            vm["spec"]["ports"] = {"db": 15432}
            api_server.apply(vm)
            expected = ["10.10.0.1:5432", "192.0.2.1:15432"]
            await seen.until(lambda found: endpoints(found) == expected)
            # What cannot be honoured is named, and disturbs nothing else.
            needs_names = {"resolution": "DNS", "addresses": ["192.0.2.101"]}
            api_server.apply(service_entry("machines", "named", **needs_names))
            static = {"endpoints": [{"address": "192.0.2.2"}]}
            api_server.apply(service_entry("machines", "static", **static))
            await seen.until(lambda found: endpoints(found, "static") == ["192.0.2.2:5432"])
            (problem,) = source.problems
            assert (problem.named, problem.path) == (
                "ServiceEntry machines/named",
                "spec.resolution",
            )
            for body in definitions:
                api_server.delete(body)
            await seen.until(
                lambda found: names(found, "machines") == {"db-0"} and not endpoints(found)
            )
            assert source.problems == ()

    asyncio.run(run())
    assert "DNS would need names to be resolved" in str(
        [vars(each).get("detail") for each in caplog.records]
    )


@pytest.mark.usefixtures("policy_kinds")
def test_policies_stay_in_force_while_the_server_starts_again(api_server: ApiServer) -> None:
    async def run() -> None:
        api_server.apply(namespace("strict"))
        async with following(source_of(api_server)) as seen:
            await seen.until(lambda _snapshot: True)
            api_server.apply_when_served(policy("strict", "p"))
            await seen.until(lambda snapshot: len(snapshot.policies) == 1)
            count = len(seen.snapshots)
            for _ in range(2):
                api_server.kill()
                await asyncio.to_thread(api_server.start)
            api_server.apply(pod("strict/a", "10.4.0.1"))
            await seen.until(lambda snapshot: names(snapshot, "strict") == {"a"})
            assert all(len(each.policies) == 1 for each in seen.snapshots[count - 1 :])

    asyncio.run(run())


def test_wrong_object_is_named_and_its_last_good_content_stays(
    api_server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(api_server)

    async def run() -> None:
        api_server.apply(namespace("wrong"))
        api_server.apply(pod("wrong/a", "10.5.0.1"))
        async with following(source) as seen:
            await seen.until(lambda snapshot: enrolled(snapshot, "wrong") == {"a"})
            body = pod("wrong/a", "10.5.0.1")
            body["metadata"]["annotations"] = {EXCLUDE_OUTBOUND_PORTS: "http"}
            api_server.apply(body)
            api_server.apply(pod("wrong/b", "10.5.0.2"))
            await seen.until(lambda snapshot: enrolled(snapshot, "wrong") == {"a", "b"})
            (problem,) = source.problems
            assert problem.named == "Pod wrong/a"
            api_server.delete(body)
            await seen.until(lambda snapshot: enrolled(snapshot, "wrong") == {"b"})
            assert source.problems == ()

    asyncio.run(run())
    assert "part of an object cannot be used; the rest of it is in force" in caplog.messages

"""Who takes part, by objects that a real API server has taken: labels, annotations, ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from agent.discovery.api import Api
from agent.discovery.kubernetes import KubernetesSource
from agent.discovery.selector_pairs import parse_pairs
from agent.discovery.translate import BYPASS_INBOUND, DNS_CAPTURE, SIDECAR_STATUS
from agent.model.enrollment import MODE_LABEL, OWN_LABEL, OWN_NAMESPACE, EnrollmentRules
from tests.support.cluster_objects import Body, enrolled, following, names, namespace, pod

if TYPE_CHECKING:
    from agent.model.pod import LocalPod
    from agent.state.store import Snapshot
    from tests.support.api_server import ApiServer


def annotated(body: Body, **annotations: str) -> Body:
    body["metadata"]["annotations"] = {
        {"sidecar": SIDECAR_STATUS, "bypass": BYPASS_INBOUND, "dns": DNS_CAPTURE}[key]: value
        for key, value in annotations.items()
    }
    return body


def ended(body: Body, phase: str) -> Body:
    body["status"]["phase"] = phase
    return body


def local(snapshot: Snapshot, name: str) -> LocalPod:
    (found,) = (
        each for group in snapshot.local_pods.values() for each in group if each.name == name
    )
    return found


def test_labels_decide_and_what_rules_a_pod_out_comes_before_them(api_server: ApiServer) -> None:
    ambient, none, other = ({MODE_LABEL: word} for word in ("ambient", "none", "other"))
    own: dict[str, Any] = dict([OWN_LABEL])
    bodies = [
        pod("in-mesh/plain", "10.12.0.1"),
        pod("in-mesh/left", "10.12.0.2", none),
        pod("in-mesh/other-word", "10.12.0.3", other),
        pod("in-mesh/on-host", "10.12.0.4", ambient, hostNetwork=True),
        annotated(pod("in-mesh/sidecar", "10.12.0.5", ambient), sidecar="{}"),
        annotated(pod("in-mesh/empty-sidecar", "10.12.0.6", ambient), sidecar=""),
        ended(pod("in-mesh/done", "10.12.0.7", ambient), "Succeeded"),
        ended(pod("in-mesh/crashed", "10.12.0.8", ambient), "Failed"),
        pod("in-mesh/looks-like-ours", "10.12.0.9", own),
        pod("out-of-mesh/joined", "10.12.1.1", ambient),
        pod("out-of-mesh/plain", "10.12.1.2"),
        pod("out-of-mesh/other-word", "10.12.1.3", other),
        pod(f"{OWN_NAMESPACE}/agent", "10.12.2.1", own | ambient),
        pod(f"{OWN_NAMESPACE}/guest", "10.12.2.2", ambient),
        pod("kube-system/dns", "10.12.3.1", ambient),
    ]
    expected = {
        "in-mesh": {"plain", "other-word", "looks-like-ours"},
        "out-of-mesh": {"joined"},
        OWN_NAMESPACE: {"guest"},
        "kube-system": set(),
    }

    async def run() -> None:
        api_server.apply(namespace("in-mesh"))
        for space in ("out-of-mesh", OWN_NAMESPACE, "kube-system"):
            api_server.apply(namespace(space, None))
        for body in bodies:
            api_server.apply(body)
        async with following(KubernetesSource(Api(api_server.configuration()))) as seen:
            found = await seen.until(lambda found: "dns" in names(found, "kube-system"))
            assert {space: enrolled(found, space) for space in expected} == expected
            # A job that ends leaves, and the address may be another's in the same moment.
            api_server.apply(ended(pod("in-mesh/plain", "10.12.0.1"), "Succeeded"))
            api_server.apply(pod("in-mesh/heir", "10.12.0.1"))
            found = await seen.until(
                lambda found: (
                    enrolled(found, "in-mesh") == {"heir", "other-word", "looks-like-ours"}
                )
            )
            assert str(local(found, "heir").addresses[0]) == "10.12.0.1"
        for body in bodies:
            api_server.delete(body)

    asyncio.run(run())


def test_an_operators_selectors_and_exclusions_take_the_place_of_the_default(
    api_server: ApiServer,
) -> None:
    pairs = parse_pairs("[{podSelector: {matchLabels: {team: red}}}]")
    rules = EnrollmentRules(pairs, frozenset({"fenced"}))
    source = KubernetesSource(Api(api_server.configuration()), rules=rules)
    bodies = [
        pod("chosen/red", "10.13.0.1", {"team": "red"}),
        pod("chosen/ambient", "10.13.0.2", {MODE_LABEL: "ambient"}),
        pod("fenced/red", "10.13.1.1", {"team": "red"}),
    ]

    async def run() -> None:
        for space in ("chosen", "fenced"):
            api_server.apply(namespace(space))
        for body in bodies:
            api_server.apply(body)
        async with following(source) as seen:
            found = await seen.until(lambda found: bool(names(found, "fenced")))
            assert enrolled(found, "chosen") == {"red"}
            assert enrolled(found, "fenced") == set()
            api_server.apply(pod("chosen/red", "10.13.0.1", {"team": "blue"}))
            await seen.until(lambda found: enrolled(found, "chosen") == set())
        for body in bodies:
            api_server.delete(body)

    asyncio.run(run())


def test_a_pods_own_words_and_all_its_addresses_arrive(api_server: ApiServer) -> None:
    double = annotated(pod("words/double", "10.14.0.1"), bypass="true", dns="False")
    double["status"]["podIPs"].append({"ip": "fd00:14::1"})
    nonsense = annotated(pod("words/nonsense", "10.14.0.2"), bypass="maybe", dns="")

    async def run() -> None:
        api_server.apply(namespace("words"))
        for body in (double, nonsense):
            api_server.apply(body)
        async with following(KubernetesSource(Api(api_server.configuration()))) as seen:
            found = await seen.until(
                lambda found: enrolled(found, "words") == {"double", "nonsense"}
            )
            words = local(found, "double")
            assert (words.bypasses_inbound, words.dns_capture) == (True, False)
            assert [str(each) for each in words.addresses] == ["10.14.0.1", "fd00:14::1"]
            absent = local(found, "nonsense")
            assert (absent.bypasses_inbound, absent.dns_capture) == (False, None)
        for body in (double, nonsense):
            api_server.delete(body)

    asyncio.run(run())

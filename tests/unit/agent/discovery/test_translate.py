"""From Kubernetes objects to our model: what each field means, and what each problem names."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from agent.discovery.translate import (
    BYPASS_INBOUND,
    DIRECT_PATH,
    DNS_CAPTURE,
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_OUTBOUND_NETWORKS,
    EXCLUDE_OUTBOUND_PORTS,
    MIRROR,
    NETWORK,
    REDIRECTION,
    SERVICE_LABEL,
    SIDECAR_STATUS,
    ObjectProblem,
    SourcedObject,
    Translation,
    Translator,
    describe,
    translate,
)
from agent.model.enrollment import (
    MODE_LABEL,
    EnrollmentRules,
    Operator,
    Refusal,
    Requirement,
    SelectorPair,
)
from agent.model.pod import Exclusions, LocalPod
from agent.model.service import Endpoint, Service, ServicePort
from agent.model.workload import NOWHERE, Locality, Workload

POD4, POD6 = ip_address("10.0.0.1"), ip_address("fd00::1")
Body = dict[str, Any]


def pod(
    name: str = "cart-0",
    labels: Body | None = None,
    annotations: Body | None = None,
    spec: Body | None = None,
    status: Body | None = None,
    **metadata: Any,
) -> Body:
    described = {
        "name": name,
        "namespace": "shop",
        "uid": f"uid-{name}",
        "labels": labels,
        "annotations": annotations,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": described | metadata,
        "spec": {"nodeName": "node-1", "serviceAccountName": "cart"} | (spec or {}),
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
        | (status or {}),
    }


def namespace(mode: str | None = "ambient", **annotations: Any) -> Body:
    labels = None if mode is None else {MODE_LABEL: mode}
    metadata = {"name": "shop", "labels": labels, "annotations": annotations.get("annotations")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def service(**spec: Any) -> Body:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "web", "port": 80}]} | spec,
    }


def endpoint_slice(name: str = "cart-1", **fields: Any) -> Body:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": {SERVICE_LABEL: "cart"}},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.1"]}],
    } | fields


def translated(*bodies: Body) -> Translation:
    return translate(SourcedObject("shop.yaml", body) for body in bodies)


def local_pods(*bodies: Body) -> list[LocalPod]:
    translation = translated(*bodies)
    assert translation.problems == ()
    return [found for group in translation.snapshot.local_pods.values() for found in group]


def the_problem(*bodies: Body) -> ObjectProblem:
    (problem,) = translated(*bodies).problems
    return problem


# -- pods ---------------------------------------------------------------------------------------


def test_pod_becomes_a_workload() -> None:
    snapshot = translated(pod()).snapshot
    assert snapshot.workloads == (
        Workload("uid-cart-0", "shop", "cart-0", "node-1", "cart", (POD4, POD6), is_hbone=False),
    )
    assert snapshot.local_pods == {}


def test_pod_says_when_it_was_made_and_whether_it_leaves() -> None:
    made, asked = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    body = pod(creationTimestamp=made, deletionTimestamp=asked)
    (workload,) = translated(body).snapshot.workloads
    assert (workload.created, workload.is_leaving) == (made, True)


def test_fields_that_may_be_missing_have_the_defaults_of_kubernetes() -> None:
    body = pod(spec={"serviceAccountName": None}, status={"podIPs": None, "podIP": "10.0.0.1"})
    del body["metadata"]["namespace"]
    (workload,) = translated(body).snapshot.workloads
    assert (workload.namespace, workload.service_account) == ("default", "default")
    assert workload.addresses == (POD4,)


@pytest.mark.parametrize(
    "body",
    [
        pod(spec={"hostNetwork": True}),
        pod(spec={"nodeName": None}),
        pod(status={"phase": "Succeeded"}),
        pod(status={"phase": "Failed"}),
        pod(status={"podIPs": []}),
        pod(status=None) | {"status": None},
    ],
    ids=["host network", "no node", "succeeded", "failed", "no address", "no status"],
)
def test_pod_that_cannot_be_known_by_its_address_is_left_out(body: Body) -> None:
    translation = translated(namespace(), body)
    assert translation.snapshot.workloads == ()
    assert translation.problems == ()


@pytest.mark.parametrize(
    ("of_namespace", "of_pod", "is_enrolled"),
    [
        (None, None, False),
        ("ambient", None, True),
        (None, "ambient", True),
        ("ambient", "none", False),
        ("none", "ambient", True),
        ("none", None, False),
        ("ambient", "sidecar", True),
        ("sidecar", None, False),
    ],
)
def test_label_of_the_pod_comes_before_that_of_its_namespace(
    of_namespace: str | None, of_pod: str | None, is_enrolled: bool
) -> None:
    labels = None if of_pod is None else {MODE_LABEL: of_pod}
    assert bool(local_pods(pod(labels=labels), namespace(of_namespace))) == is_enrolled


def test_pod_of_a_namespace_that_is_not_known_may_still_ask_for_itself() -> None:
    assert local_pods(pod()) == []
    assert len(local_pods(pod(labels={MODE_LABEL: "ambient"}))) == 1


def test_local_pods_are_listed_by_node_in_order_of_uid() -> None:
    bodies = [pod("b"), pod("a"), pod("c", spec={"nodeName": "node-0"})]
    found = translated(namespace(), *bodies).snapshot.local_pods
    assert list(found) == ["node-0", "node-1"]
    assert [each.name for each in found["node-1"]] == ["a", "b"]


@pytest.mark.parametrize(("word", "is_hbone"), [("enabled", True), ("disabled", False)])
def test_redirection_says_whether_a_tunnel_will_be_answered(word: str, is_hbone: bool) -> None:
    (workload,) = translated(pod(annotations={REDIRECTION: word})).snapshot.workloads
    assert workload.is_hbone == is_hbone


def test_annotations_exclude_ports_and_networks() -> None:
    annotations = {
        EXCLUDE_OUTBOUND_PORTS: "80, 443,,65535 ",
        EXCLUDE_OUTBOUND_NETWORKS: "10.1.2.3/8,fd00::/16, 192.0.2.1",
        EXCLUDE_INBOUND_PORTS: "1",
    }
    (found,) = local_pods(namespace(), pod(annotations=annotations))
    assert found.exclusions == Exclusions(
        outbound_ports=frozenset({80, 443, 65535}),
        outbound_networks=(
            ip_network("10.0.0.0/8"),
            ip_network("fd00::/16"),
            ip_network("192.0.2.1/32"),
        ),
        inbound_ports=frozenset({1}),
    )


def test_empty_annotations_exclude_nothing() -> None:
    annotations = {EXCLUDE_OUTBOUND_PORTS: "", EXCLUDE_OUTBOUND_NETWORKS: " , "}
    (found,) = local_pods(namespace(), pod(annotations=annotations))
    assert found.exclusions == Exclusions()


@pytest.mark.parametrize(
    "name", [EXCLUDE_OUTBOUND_PORTS, EXCLUDE_OUTBOUND_NETWORKS, EXCLUDE_INBOUND_PORTS, DIRECT_PATH]
)
@pytest.mark.parametrize("text", ["*", "true"])
def test_wrong_annotation_is_a_problem_and_the_pod_takes_part_without_it(
    name: str, text: str
) -> None:
    plain, wrong = pod(), pod(annotations={name: text})
    translator = Translator()
    assert put(translator, namespace()) == []
    problem = translator.put(SourcedObject("a", wrong))
    assert problem is not None
    assert (problem.path, problem.is_partial) == (f"metadata.annotations[{name}]", True)
    assert translator.snapshot() == translated(namespace(), plain).snapshot
    assert translator.judge(plain) is not None
    assert translator.judge(wrong) == translator.judge(plain)


def test_wrong_annotation_of_a_namespace_keeps_nobody_out() -> None:
    wrong = namespace(annotations={DIRECT_PATH: "true"})
    found = translated(wrong, pod())
    assert [problem.is_partial for problem in found.problems] == [True]
    assert found.snapshot == translated(namespace(), pod()).snapshot


@pytest.mark.parametrize(
    ("of_namespace", "of_pod", "may_go_direct"),
    [
        (None, None, True),
        ("disabled", None, False),
        ("disabled", "enabled", True),
        ("enabled", "disabled", False),
        ("", "", True),
    ],
)
def test_direct_path_is_the_pods_word_then_its_namespaces(
    of_namespace: str | None, of_pod: str | None, may_go_direct: bool
) -> None:
    outer = None if of_namespace is None else {DIRECT_PATH: of_namespace}
    inner = None if of_pod is None else {DIRECT_PATH: of_pod}
    (found,) = local_pods(namespace(annotations=outer), pod(annotations=inner))
    assert found.may_go_direct == may_go_direct


# -- services -----------------------------------------------------------------------------------


def test_service_has_the_ready_endpoints_of_all_its_slices() -> None:
    second = endpoint_slice(
        "cart-2",
        addressType="IPv6",
        ports=[{"name": "web", "port": 8081}, {"port": 53, "protocol": "UDP"}, {"name": "any"}],
        endpoints=[
            {"addresses": ["fd00::1", "fd00::2"], "conditions": {"ready": True}},
            {"addresses": ["fd00::3"], "conditions": {"ready": False}},
            {"addresses": ["fd00::4"], "conditions": {}},
        ],
    )
    third = endpoint_slice("cart-3", ports=[{"port": 9090}])
    snapshot = translated(endpoint_slice(), second, service(), third).snapshot
    assert snapshot.services == (
        Service(
            "shop",
            "cart",
            (ip_address("10.96.0.1"),),
            (ServicePort("web", 80),),
            (
                Endpoint(POD4, (("", 9090), ("web", 8080))),
                Endpoint(ip_address("fd00::1"), (("web", 8081),)),
                Endpoint(ip_address("fd00::2"), (("web", 8081),)),
                Endpoint(ip_address("fd00::4"), (("web", 8081),)),
            ),
        ),
    )


def test_endpoint_that_leaves_and_serves_counts_where_there_is_no_other() -> None:
    leaving = {"ready": False, "serving": True, "terminating": True}
    endpoints: list[Body] = [
        {"addresses": ["10.0.0.2"], "conditions": leaving},
        {"addresses": ["10.0.0.3"], "conditions": leaving | {"serving": False}},
        {"addresses": ["10.0.0.4"], "conditions": leaving | {"terminating": False}},
        {"addresses": ["10.0.0.5"], "conditions": {"ready": False}},
    ]
    last = endpoint_slice("cart-2", endpoints=endpoints)
    (found,) = translated(service(), last).snapshot.services
    assert found.endpoints_for(80) == ((ip_address("10.0.0.2"), 8080),)
    (found,) = translated(service(), last, endpoint_slice()).snapshot.services
    assert found.endpoints_for(80) == ((POD4, 8080),)


def test_service_may_have_several_addresses_or_none() -> None:
    dual = service(clusterIPs=["10.96.0.1", "fd00:96::1"])
    assert len(translated(dual).snapshot.services[0].addresses) == 2
    for nothing in ("None", "", None):
        assert translated(service(clusterIP=nothing)).snapshot.services[0].addresses == ()


def test_service_has_the_addresses_of_its_load_balancers_but_of_those_that_are_proxies() -> None:
    ingress = [
        {"ip": "192.0.2.7"},
        {"ip": "192.0.2.8", "ipMode": "VIP"},
        {"ip": "192.0.2.9", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"},
    ]
    body = service() | {"status": {"loadBalancer": {"ingress": ingress}}}
    (found,) = translated(body).snapshot.services
    assert found.addresses == (ip_address("10.96.0.1"),)
    assert found.balanced == (ip_address("192.0.2.7"), ip_address("192.0.2.8"))


def test_service_may_be_local_to_each_node() -> None:
    endpoints = [{"addresses": ["10.0.0.1"], "nodeName": "east"}]
    bodies = service(internalTrafficPolicy="Local"), endpoint_slice(endpoints=endpoints)
    (found,) = translated(*bodies).snapshot.services
    assert (found.is_local, found.endpoints[0].node) == (True, "east")
    (found,) = translated(service(internalTrafficPolicy="Cluster")).snapshot.services
    assert not found.is_local


def test_only_tcp_ports_of_a_service_count() -> None:
    ports = [{"port": 53, "protocol": "UDP"}, {"port": 80, "protocol": "TCP"}, {"port": 81}]
    (found,) = translated(service(ports=ports)).snapshot.services
    assert found.ports == (ServicePort("", 80), ServicePort("", 81))


def test_slice_of_no_service_or_of_names_is_not_read() -> None:
    stray = endpoint_slice()
    stray["metadata"]["labels"] = None
    names = endpoint_slice("cart-2", addressType="FQDN", endpoints=[{"addresses": ["example.com"]}])
    translation = translated(service(), stray, names)
    assert translation.problems == ()
    assert translation.snapshot.services[0].endpoints == ()


# -- problems -----------------------------------------------------------------------------------


def test_object_of_another_kind_is_not_read() -> None:
    other = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": "what"}
    assert translated(other, pod() | {"apiVersion": "v2"}) == translated()


@pytest.mark.parametrize(
    ("body", "named", "path", "detail"),
    [
        ({}, "object default/?", "apiVersion", "is required"),
        ({"apiVersion": "v1"}, "object default/?", "kind", "is required"),
        ({"apiVersion": 1}, "object default/?", "apiVersion", "must be a string, not 1: quote it"),
        (pod() | {"metadata": None}, "Pod default/?", "metadata.uid", "is required"),
        (pod() | {"metadata": "x"}, "Pod default/?", "metadata", "must be a mapping"),
        (pod(name=""), "Pod shop/?", "metadata.name", "'' is not a valid name"),
        (pod(name="Cart"), "Pod shop/Cart", "metadata.name", "'Cart' is not a valid name"),
        (pod(namespace="a/b"), "Pod a/b/cart-0", "metadata.namespace", "'a/b' is not a valid name"),
        (pod(uid="../x"), "Pod shop/cart-0", "metadata.uid", "'../x' is not a valid name"),
        (pod(uid=None), "Pod shop/cart-0", "metadata.uid", "is required"),
        (pod(labels={MODE_LABEL: True}), "Pod shop/cart-0", f"metadata.labels[{MODE_LABEL}]",
         "must be a string, not True: quote it"),
        (pod(spec={"serviceAccountName": "a b"}), "Pod shop/cart-0", "spec.serviceAccountName",
         "'a b' is not a valid name"),
        (pod(spec={"hostNetwork": "yes"}), "Pod shop/cart-0", "spec.hostNetwork",
         "must be true or false, not 'yes'"),
        (pod(status={"podIPs": "10.0.0.1"}), "Pod shop/cart-0", "status.podIPs", "must be a list"),
        (pod(status={"podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.300"}]}), "Pod shop/cart-0",
         "status.podIPs[1].ip", "'10.0.0.300' is not an IP address"),
        (pod(annotations={EXCLUDE_OUTBOUND_PORTS: "80,http"}), "Pod shop/cart-0",
         f"metadata.annotations[{EXCLUDE_OUTBOUND_PORTS}]", "'http' is not a port from 1 to 65535"),
        (pod(annotations={EXCLUDE_OUTBOUND_PORTS: 80}), "Pod shop/cart-0",
         f"metadata.annotations[{EXCLUDE_OUTBOUND_PORTS}]", "must be a string, not 80: quote it"),
        (pod(annotations={EXCLUDE_INBOUND_PORTS: "65536"}), "Pod shop/cart-0",
         f"metadata.annotations[{EXCLUDE_INBOUND_PORTS}]", "65536 is not a port from 1 to 65535"),
        (pod(annotations={EXCLUDE_INBOUND_PORTS: "+80"}), "Pod shop/cart-0",
         f"metadata.annotations[{EXCLUDE_INBOUND_PORTS}]", "'+80' is not a port from 1 to 65535"),
        (pod(annotations={EXCLUDE_OUTBOUND_NETWORKS: "10.0.0.0/33"}), "Pod shop/cart-0",
         f"metadata.annotations[{EXCLUDE_OUTBOUND_NETWORKS}]",
         "'10.0.0.0/33' is not an IP range such as 10.0.0.0/8"),
        (pod(annotations={DIRECT_PATH: "off"}), "Pod shop/cart-0",
         f"metadata.annotations[{DIRECT_PATH}]", "must be enabled or disabled, not 'off'"),
        (namespace(annotations={DIRECT_PATH: "on"}), "Namespace shop",
         f"metadata.annotations[{DIRECT_PATH}]", "must be enabled or disabled, not 'on'"),
        (namespace() | {"metadata": {"name": "Shop"}}, "Namespace Shop", "metadata.name",
         "'Shop' is not a valid name"),
        (service(ports=[{"name": "web"}]), "Service shop/cart", "spec.ports[0].port",
         "is required"),
        (service(ports=[{"port": "80"}]), "Service shop/cart", "spec.ports[0].port",
         "'80' is not a port from 1 to 65535"),
        (service(ports=[{"port": True}]), "Service shop/cart", "spec.ports[0].port",
         "True is not a port from 1 to 65535"),
        (service(clusterIP="10.96"), "Service shop/cart", "spec.clusterIP",
         "'10.96' is not an IP address"),
        (endpoint_slice(endpoints=[{"addresses": ["here"]}]), "EndpointSlice shop/cart-1",
         "endpoints[0].addresses[0]", "'here' is not an IP address"),
        (endpoint_slice(addressType=None), "EndpointSlice shop/cart-1", "addressType",
         "is required"),
        (endpoint_slice(ports={}), "EndpointSlice shop/cart-1", "ports", "must be a list"),
    ],
)  # fmt: skip
def test_problem_names_file_object_field_and_reason(
    body: Body, named: str, path: str, detail: str
) -> None:
    problem = the_problem(body)
    assert (problem.file, problem.named, problem.path) == ("shop.yaml", named, path)
    assert problem.detail == detail
    assert str(problem) == f"shop.yaml: {named}: {path}: {detail}"


def test_wrong_object_disturbs_no_other() -> None:
    wrong = pod("wrong", status={"podIPs": [{"ip": "here"}]})
    alone, beside = translated(namespace(), pod()), translated(wrong, namespace(), pod())
    assert beside.snapshot == alone.snapshot
    assert len(beside.problems) == 1


def test_second_object_of_a_name_or_uid_is_a_problem_and_the_first_counts() -> None:
    second = pod(status={"podIPs": [{"ip": "10.0.0.9"}]})
    translation = translate([SourcedObject("a.yaml", pod()), SourcedObject("b.yaml", second)])
    assert translation.snapshot == translated(pod()).snapshot
    assert str(translation.problems[0]) == (
        "b.yaml: Pod shop/cart-0: metadata.name: is defined in a.yaml already"
    )
    problem = the_problem(pod(), pod("web", uid="uid-cart-0"))
    assert (problem.path, problem.detail) == ("metadata.uid", "belongs to another pod already")


def test_object_that_is_wrong_leaves_its_name_to_a_right_one() -> None:
    wrong = pod(status={"podIPs": [{"ip": "here"}]})
    assert translated(wrong, pod()).snapshot == translated(pod()).snapshot


def test_policies_are_read_in_order_of_their_names_and_pods_have_labels() -> None:
    def policy(kind: str, name: str) -> Body:
        metadata = {"namespace": "shop", "name": name}
        return {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata}

    snapshot = translated(
        policy("PeerAuthentication", "b"), policy("AuthorizationPolicy", "a"), pod()
    ).snapshot
    assert [str(found.key) for found in snapshot.policies] == [
        "AuthorizationPolicy shop/a",
        "PeerAuthentication shop/b",
    ]
    (workload,) = snapshot.workloads
    assert workload.labels == frozenset(
        (str(name), text) for name, text in (pod()["metadata"].get("labels") or {}).items()
    )


# -- enrollment ---------------------------------------------------------------------------------


def test_pod_with_a_sidecar_is_a_workload_and_never_enrolled() -> None:
    for word in ("", "{}"):
        found = pod(annotations={SIDECAR_STATUS: word}, labels={MODE_LABEL: "ambient"})
        snapshot = translated(namespace(), found).snapshot
        assert len(snapshot.workloads) == 1
        assert snapshot.local_pods == {}
        assert snapshot.refusals == {snapshot.workloads[0].uid: Refusal.SIDECAR}


def test_rules_decide_with_the_labels_of_pod_and_namespace() -> None:
    only_red = Requirement("color", Operator.IN, frozenset({"red"}))
    rules = EnrollmentRules((SelectorPair((only_red,), (only_red,)),))
    red = namespace() | {"metadata": {"name": "shop", "labels": {"color": "red"}}}
    for of_pod, of_namespace, count in (("red", red, 1), ("blue", red, 0), ("red", namespace(), 0)):
        sources = [
            SourcedObject("a", pod(labels={"color": of_pod})),
            SourcedObject("b", of_namespace),
        ]
        assert len(translate(sources, rules=rules).snapshot.local_pods) == count


def test_excluded_namespace_has_workloads_and_no_local_pods() -> None:
    rules = EnrollmentRules(excluded_namespaces=frozenset({"shop"}))
    sources = [SourcedObject("a", namespace()), SourcedObject("b", pod())]
    snapshot = translate(sources, rules=rules).snapshot
    assert (len(snapshot.workloads), snapshot.local_pods) == (1, {})
    assert snapshot.refusals == {snapshot.workloads[0].uid: Refusal.NAMESPACE}


@pytest.mark.parametrize(
    ("word", "meaning"),
    [(None, None), ("true", True), ("T", True), ("1", True), ("false", False), ("F", False),
     ("yes", None), ("", None), ("tRUE", None), (True, None)],
)  # fmt: skip
def test_words_of_a_pod_are_read_as_go_reads_them(word: Any, meaning: bool | None) -> None:
    (found,) = local_pods(namespace(), pod(annotations={BYPASS_INBOUND: word, DNS_CAPTURE: word}))
    assert found.dns_capture is meaning
    assert found.bypasses_inbound is (meaning is True)


@pytest.mark.parametrize(
    ("word", "uid"),
    [(None, ""), ("0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef"),
     # What could be the uid of another pod's cgroup is not believed.
     ("0d7c0000-8a52-4b7c-9a55-7d7f7f7f7f7f", ""), ("true", ""), (1, "")],
)  # fmt: skip
def test_mirror_of_a_static_pod_says_its_uid_on_the_node(word: Any, uid: str) -> None:
    (found,) = local_pods(namespace(), pod(annotations={MIRROR: word}))
    assert found.node_uid == uid


def test_pod_that_ended_leaves_whatever_else_it_says() -> None:
    ended = pod(status={"phase": "Succeeded"}, annotations={EXCLUDE_OUTBOUND_PORTS: "http"})
    assert translated(namespace(), ended).problems == ()


# -- one after the other ------------------------------------------------------------------------


def put(translator: Translator, *bodies: Body) -> list[str]:
    problems = [translator.put(SourcedObject("cluster", body)) for body in bodies]
    return [problem.detail for problem in problems if problem is not None]


def everything() -> list[Body]:
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "a"},
    }
    return [pod(), namespace(), service(), endpoint_slice(), endpoint_slice("cart-2"), policy]


def test_order_of_arrival_does_not_matter_and_nothing_is_left_after_removal() -> None:
    expected = translated(*everything()).snapshot
    translator = Translator()
    empty = translator.snapshot()
    for bodies in (everything(), everything()[::-1], everything()):  # and twice over
        assert put(translator, *bodies) == []
        assert translator.snapshot() == expected
    for body in everything():
        translator.remove(describe(body))
    assert translator.snapshot() == empty
    translator.remove("Pod shop/unknown")


def test_changes_show_in_what_was_worked_out_before() -> None:
    translator = Translator()
    put(translator, *everything())
    translator.snapshot()
    put(translator, namespace(annotations={DIRECT_PATH: "disabled"}))
    ((found,),) = translator.snapshot().local_pods.values()
    assert not found.may_go_direct
    put(translator, namespace(mode=None), endpoint_slice("cart-2", endpoints=[]))
    translator.remove("EndpointSlice shop/cart-1")
    snapshot = translator.snapshot()
    assert snapshot.local_pods == {}
    assert snapshot.services[0].endpoints == ()
    put(translator, pod(labels={MODE_LABEL: "ambient"}), service(clusterIP="10.96.0.2"))
    snapshot = translator.snapshot()
    assert len(snapshot.local_pods) == 1
    assert snapshot.services[0].addresses == (ip_address("10.96.0.2"),)


def test_wrong_object_leaves_its_last_good_content_in_force() -> None:
    translator = Translator()
    put(translator, namespace(), pod())
    before = translator.snapshot()
    wrong = pod(spec={"serviceAccountName": "a b"})
    assert put(translator, wrong) == ["'a b' is not a valid name"]
    assert translator.snapshot() == before


def test_wrong_pod_that_took_over_a_name_does_not_keep_the_old_one() -> None:
    translator = Translator()
    put(translator, namespace(), pod())
    assert put(translator, pod(spec={"serviceAccountName": "a b"}, uid="uid-new")) != []
    assert translator.snapshot().workloads == ()
    assert put(translator, pod("other", uid="uid-cart-0")) == []


def test_names_are_listed_by_kind() -> None:
    translator = Translator()
    put(translator, pod(), pod("ended", status={"phase": "Failed"}), namespace())
    assert translator.names("Pod") == {"Pod shop/cart-0", "Pod shop/ended"}
    assert translator.names("Po") == set()


def test_machine_and_its_service_are_known() -> None:
    entry = {
        "apiVersion": "networking.istio.io/v1beta1",
        "kind": "WorkloadEntry",
        "metadata": {"namespace": "shop", "name": "vm"},
        "spec": {"address": "192.0.2.1", "labels": {"app": "db"}},
    }
    service_entry = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"namespace": "shop", "name": "db"},
        "spec": {
            "hosts": ["db.example.com"],
            "addresses": ["192.0.2.100"],
            "resolution": "STATIC",
            "ports": [{"number": 5432, "name": "db"}],
            "workloadSelector": {"labels": {"app": "db"}},
        },
    }
    found = translated(entry, service_entry)
    assert found.problems == ()
    (workload,), (service,) = found.snapshot.workloads, found.snapshot.services
    assert (workload.name, workload.node) == ("vm", "")
    assert service.endpoints_for(5432) == ((ip_address("192.0.2.1"), 5432),)


@pytest.mark.parametrize(
    ("conditions", "deleted", "is_endpoint"),
    [
        (None, None, True),
        ([{"type": "Ready", "status": "True"}], None, True),
        ([{"type": "Ready", "status": "False"}], None, False),
        ([{"type": "Initialized", "status": "False"}], None, True),
        ([{"type": "Ready", "status": "True"}], "2026-01-01T00:00:00Z", False),
    ],
)
def test_pod_that_an_entry_selects_is_an_endpoint_while_it_is_ready(
    conditions: Any, deleted: str | None, is_endpoint: bool
) -> None:
    service_entry = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"namespace": "shop", "name": "db"},
        "spec": {
            "hosts": ["db.example.com"],
            "resolution": "STATIC",
            "workloadSelector": {"labels": {"app": "db"}},
        },
    }
    status = {"podIPs": [{"ip": str(POD4)}], "conditions": conditions}
    body = pod(labels={"app": "db"}, status=status, deletionTimestamp=deleted)
    (service,) = translated(service_entry, body).snapshot.services
    assert bool(service.endpoints) is is_endpoint


def test_pod_without_an_address_is_starting_and_nowhere_else() -> None:
    unplaced = pod("cart-1", spec={"nodeName": ""}, status={"podIPs": []})
    starting = pod("cart-0", {"app": "cart"}, status={"podIPs": []})
    objects = [SourcedObject("a", body) for body in (namespace(), starting, unplaced)]
    snapshot = translate(objects).snapshot
    assert snapshot.workloads == ()
    assert snapshot.local_pods == {}
    (found,) = snapshot.starting
    assert (found.uid, found.node, found.workload.addresses) == ("uid-cart-0", "node-1", ())
    assert found.workload.labels == frozenset({("app", "cart")})
    assert found.local == LocalPod("uid-cart-0", "shop", "cart-0", "cart", ())
    unmeshed = translate([SourcedObject("a", starting)]).snapshot.starting
    assert [each.local for each in unmeshed] == [None]


def test_pod_is_judged_alone_beside_what_is_known() -> None:
    translator = Translator()
    body = pod("cart-0", status={"podIPs": []})
    assert translator.judge(body) is None  # its namespace is not known
    translator.put(SourcedObject("a", namespace()))
    found = translator.judge(body)
    assert found is not None
    assert found.local is not None
    assert translator.snapshot().starting == ()  # and nothing is kept
    for unusable in (pod("cart-0", spec={"nodeName": ""}), pod("cart-0", uid=None)):
        assert translator.judge(unusable) is None
    optout = translator.judge(pod("cart-0", {MODE_LABEL: "none"}))
    assert optout is not None
    assert optout.local is None


def node(region: str = "", zone: str = "") -> Body:
    labels = {"topology.kubernetes.io/region": region, "topology.kubernetes.io/zone": zone}
    given = {name: value for name, value in labels.items() if value}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "east", "labels": given}}


def test_pods_are_where_their_node_is_whatever_comes_first() -> None:
    translator = Translator()
    elsewhere = pod("stock", spec={"nodeName": "west"})

    def localities() -> dict[str, Locality]:
        return {each.name: each.locality for each in translator.snapshot().workloads}

    assert put(translator, pod(spec={"nodeName": "east"}), elsewhere) == []
    assert localities() == {"cart-0": NOWHERE, "stock": NOWHERE}
    assert put(translator, node("eu", "eu-1"), pod("cart-1", spec={"nodeName": "east"})) == []
    here = Locality("eu", "eu-1")
    assert localities() == {"cart-0": here, "cart-1": here, "stock": NOWHERE}
    changes = translator.changes
    assert put(translator, node("eu", "eu-1")) == []  # as a kubelet says again and again
    assert translator.changes == changes
    assert put(translator, node("eu")) == []
    assert translator.changes > changes
    assert localities() == {"cart-0": Locality("eu"), "cart-1": Locality("eu"), "stock": NOWHERE}
    translator.remove("Node east")
    translator.remove("Node east")
    assert set(localities().values()) == {NOWHERE}


def test_network_of_a_pod_is_its_label_unless_that_is_the_clusters_own() -> None:
    own = namespace() | {"metadata": {"name": "istio-system", "labels": {NETWORK: "east"}}}
    bodies = (
        pod("near", labels={NETWORK: "east"}),
        pod("far", labels={NETWORK: "west"}),
        pod("silent"),
    )
    for more, near in (((own,), ""), ((), "east")):
        found = translated(*bodies, *more).snapshot.workloads
        assert {each.name: each.network for each in found} == {
            "near": near, "far": "west", "silent": "",
        }  # fmt: skip

"""The indexed rulebook decides as the plain reading of the same objects does, name and rule too."""

from __future__ import annotations

import copy
from ipaddress import ip_address
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.discovery.translate import SourcedObject, translate
from agent.model.condition import Connection
from agent.model.identity import SpiffeId
from agent.state.rulebook import Rulebook
from tests.support.plain_policies import Body, Visit, judge

NAMESPACES = ["a", "ab", "b", "istio-system"]
ACCOUNTS = ["web", "we", "db"]
PORTS = ["80", "81", "443"]
CREATED = ["2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z"]
DOMAINS = ["cluster.local", "td"]
LABELS = {"app": ["x", "y"], "tier": ["1", "2"]}
ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "11.0.0.1", "::1", "fd00::1", "fd00::2", "::a00:1"]
NETWORKS = ["10.0.0.0/24", "10.0.0.1", "10.0.0.0/8", "0.0.0.0/0", "fd00::/64", "fd00::1", "::/0"]


def some(values: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3)


def patterns(values: list[str]) -> list[str]:
    """As many of each kind, so that each is tried as often."""
    cut = {value[: len(value) - 1] + "*" for value in values}
    ends = {"*" + value[1:] for value in values} | {"*" + value[-1:] for value in values}
    return [*values, *sorted(cut), *sorted(ends), "*", "*"]


PRINCIPALS = [
    f"{domain}/ns/{namespace}/sa/{account}"
    for domain in DOMAINS
    for namespace in NAMESPACES[:2]
    for account in ACCOUNTS
]
TEXTS = {
    "principals": [*patterns(PRINCIPALS), "*/ns/a/sa/web", "cluster.local/ns/a/*"],
    "namespaces": patterns(NAMESPACES),
    "serviceAccounts": [*ACCOUNTS, *(f"{n}/{a}" for n in NAMESPACES for a in ACCOUNTS)],
    "ipBlocks": NETWORKS,
}


def negated(name: str) -> str:
    return f"not{name[0].upper()}{name[1:]}"


def fields(values: dict[str, list[str]], l7: list[str]) -> st.SearchStrategy[Body]:
    known = {name: some(found) for name, found in values.items()}
    known |= {negated(name): some(found) for name, found in values.items()}
    seldom = {name: st.just(["x"]) for name in l7}
    names = st.one_of(
        st.sampled_from(sorted(known)).map(lambda name: {name}),
        st.sampled_from(sorted(known)).map(lambda name: {name}),
        st.sets(st.sampled_from(sorted(known | seldom)), min_size=1, max_size=3),
    )
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({name: (known | seldom)[name] for name in chosen})
    )


CONDITIONS = {
    "source.principal": TEXTS["principals"],
    "source.namespace": TEXTS["namespaces"],
    "source.serviceAccount": TEXTS["serviceAccounts"],
    "source.ip": NETWORKS,
    "destination.ip": NETWORKS,
    "destination.port": PORTS,
    "request.headers[x]": ["y"],
}


@st.composite
def conditions(draw: st.DrawFn) -> Body:
    key = draw(st.sampled_from(sorted(CONDITIONS)))
    names = draw(st.sampled_from([("values",), ("notValues",), ("values", "notValues")]))
    return {"key": key, **{name: draw(some(CONDITIONS[key])) for name in names}}


SOURCES = fields(TEXTS, ["requestPrincipals", "notRemoteIpBlocks"])
OPERATIONS = fields({"ports": PORTS}, ["methods", "notPaths"])
RULES: st.SearchStrategy[Body] = st.fixed_dictionaries(
    {},
    optional={
        "from": st.lists(SOURCES.map(lambda s: {"source": s}), min_size=1, max_size=2),
        "to": st.lists(OPERATIONS.map(lambda o: {"operation": o}), min_size=1, max_size=2),
        "when": st.lists(conditions(), max_size=2),
    },
)
LABEL_SETS = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in LABELS.items()})
SELECTORS = LABEL_SETS.map(lambda labels: {"matchLabels": labels})


def policies(name: str) -> st.SearchStrategy[Body]:
    return st.fixed_dictionaries(
        {
            "apiVersion": st.just("security.istio.io/v1"),
            "kind": st.just("AuthorizationPolicy"),
            "metadata": st.fixed_dictionaries(
                {
                    "name": st.just(name),
                    "namespace": st.sampled_from(["a", "a", "b", "istio-system"]),
                    "annotations": st.fixed_dictionaries(
                        {"istio.io/dry-run": st.sampled_from(["false", "false", "true"])}
                    ),
                }
            ),
            "spec": st.fixed_dictionaries(
                {"action": st.sampled_from(["ALLOW", "DENY"])},
                optional={"rules": st.lists(RULES, max_size=3), "selector": SELECTORS},
            ),
        }
    )


MODES = st.fixed_dictionaries({"mode": st.sampled_from(["UNSET", "STRICT", "PERMISSIVE"])})


@st.composite
def authentications(draw: st.DrawFn, name: str) -> Body:
    spec: Body = {"mtls": draw(MODES)}
    labels = draw(LABEL_SETS)
    if labels:
        spec["selector"] = {"matchLabels": labels}
        spec |= draw(st.sampled_from([{}, {"portLevelMtls": {"80": draw(MODES)}}]))
    return {
        "apiVersion": "security.istio.io/v1beta1",
        "kind": "PeerAuthentication",
        "metadata": {
            "name": name,
            "namespace": draw(st.sampled_from(["a", "b", "istio-system"])),
            "creationTimestamp": draw(st.sampled_from(CREATED)),
        },
        "spec": spec,
    }


@st.composite
def bodies(draw: st.DrawFn) -> list[Body]:
    found = [draw(policies(f"p{number}")) for number in range(draw(st.integers(0, 6)))]
    found += [draw(authentications(f"m{number}")) for number in range(draw(st.integers(0, 3)))]
    return found


# Every pod sees several visitors: most rules match few of them.
IDENTITIES = [None, *((d, n, a) for d in DOMAINS for n in NAMESPACES for a in ACCOUNTS)]
VISITS = [
    Visit(source, identity, destination, port, namespace, labels)
    for source in ADDRESSES
    for identity in IDENTITIES
    for destination in ("10.0.0.1", "fd00::1")
    for port in (80, 81, 443)
    for namespace in ("a", "b")
    for labels in ({}, {"app": "x"}, {"app": "x", "tier": "1"})
]
SAMPLES = st.randoms(use_true_random=False).map(lambda random: random.sample(VISITS, 50))


def decide(rulebook: Rulebook, visit: Visit) -> tuple[bool, str | None, bool]:
    connection = Connection(
        ip_address(visit.source),
        SpiffeId(*visit.identity) if visit.identity else None,
        ip_address(visit.destination),
        visit.port,
    )
    verdict = rulebook.judge(visit.namespace, frozenset(visit.labels.items()), connection)
    would_be = verdict.would_be or verdict
    return verdict.is_allowed, verdict.decided_by, would_be.is_allowed


def expect(objects: list[Body], visit: Visit) -> tuple[bool, str | None, bool]:
    is_allowed, decided_by = judge(objects, visit, with_dry_run=False)
    return is_allowed, decided_by, judge(objects, visit, with_dry_run=True)[0]


def read(objects: list[Body]) -> Any:
    translation = translate(SourcedObject("test", body) for body in objects)
    assert translation.problems == ()
    return translation.snapshot.policies


@settings(max_examples=300, deadline=None)
@given(bodies(), SAMPLES)
def test_indexed_verdict_equals_the_plain_one(objects: list[Body], visits: list[Visit]) -> None:
    rulebook = Rulebook()
    for policy in read(objects):
        rulebook.put(policy)
    for visit in visits:
        assert decide(rulebook, visit) == expect(objects, visit)


@settings(max_examples=100, deadline=None)
@given(bodies(), bodies(), SAMPLES, st.randoms())
def test_replacing_policies_leaves_nothing_of_the_old_ones(
    before: list[Body], after: list[Body], visits: list[Visit], random: Any
) -> None:
    rulebook = Rulebook()
    old, new = list(read(before)), list(read(after))
    for policy in old:
        rulebook.put(policy)
    random.shuffle(new)
    for policy in new:
        rulebook.put(policy)
    for key in {policy.key for policy in old} - {policy.key for policy in new}:
        rulebook.remove(key)
    for visit in visits:
        assert decide(rulebook, visit) == expect(after, visit)
    for policy in new:
        rulebook.remove(policy.key)
    assert list(rulebook) == []
    assert all(decide(rulebook, visit) == (True, None, True) for visit in visits)


@settings(max_examples=100, deadline=None)
@given(bodies(), SAMPLES)
def test_rule_that_cannot_be_read_changes_nothing_about_the_others(
    objects: list[Body], visits: list[Visit]
) -> None:
    damaged = copy.deepcopy(objects)
    policies = [each for each in damaged if each["kind"] == "AuthorizationPolicy"]
    for body in policies:
        body["spec"].setdefault("rules", []).append({"from": [{"source": {"ipBlocks": ["x"]}}]})
    translation = translate(SourcedObject("test", body) for body in damaged)
    assert [problem.is_partial for problem in translation.problems] == [True] * len(policies)
    rulebook = Rulebook()
    rulebook.change(translation.snapshot.policies)
    for visit in visits:
        assert decide(rulebook, visit) == expect(objects, visit)

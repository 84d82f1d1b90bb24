"""From AuthorizationPolicy and PeerAuthentication (security.istio.io) to our policies. Pure.

Meaning and corner cases are Istio's; where its code and its pages differ, and where we are
stricter, docs/decisions/0008-policies-fail-safe.md says what was chosen. A field that is not
known is an error: a policy with a slip of the pen would otherwise do something else than it says.
A rule that cannot be read is left out, and the policy is in force without it: an ALLOW that is not
there at all would let everybody in.

An attribute of HTTP cannot be seen on L4. A rule of an ALLOW that has one never matches; in a DENY
it is left out, and so is a whole clause of which nothing else would remain. Either way less gets
through than the policy says, and a warning says so.
"""

from __future__ import annotations

from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING

from agent.discovery.fields import LABEL_NAME, SUBDOMAIN_NAME, Field, read_created
from agent.model.condition import Attribute, Term, network_set, port_set, text_set
from agent.model.policy import (
    Action,
    Clause,
    Mode,
    PeerAuthentication,
    Policy,
    PolicyKey,
    Rule,
    Scope,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.model.condition import ValueSet
    from agent.model.pod import Network
    from agent.model.policy import Match

    Read = Callable[[list[Field], str], ValueSet]

DEFAULT_ROOT_NAMESPACE = "istio-system"
DRY_RUN = "istio.io/dry-run"
MAPPED_BITS = 96  # before the IPv4 address in a v4-mapped one (RFC 4291 §2.5.5.2)
TRUE = {"1", "t", "T", "true", "TRUE", "True"}
FALSE = {"", "0", "f", "F", "false", "FALSE", "False"}
REFUSED_ACTIONS = {
    "CUSTOM": "needs an external authorizer, which Sidestep does not call",
    "AUDIT": "is for audit plug-ins of proxies; the annotation istio.io/dry-run tries a policy",
}
L7_SOURCE = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks")
L7_OPERATION = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
L7_CONDITIONS = ("request.", "remote.ip", "connection.sni", "experimental.")
NO_RULES: tuple[Rule, ...] = ()
UNSEEN = "is an attribute of HTTP, which is not seen here"


def _read_texts(items: list[Field], _namespace: str) -> ValueSet:
    for item in items:
        if not item.text():
            raise item.wrong("must not be empty")
    return text_set(item.text() for item in items)


def _read_accounts(items: list[Field], namespace: str) -> ValueSet:
    accounts = []
    for item in items:
        parts = item.text().split("/")
        if "*" in item.text() or len(parts) > 2 or not all(parts):
            raise item.wrong(f"{item.text()!r} is not <namespace>/<account> or <account>")
        accounts.append("/".join(parts if len(parts) == 2 else [namespace, *parts]))
    return text_set(accounts)


def _read_networks(items: list[Field], _namespace: str) -> ValueSet:
    networks = []
    for item in items:
        try:
            networks.append(_canonical(ip_network(item.text(), strict=False)))
        except ValueError:
            raise item.wrong(f"{item.text()!r} is not an address or a range of them") from None
    return network_set(networks)


def _canonical(network: Network) -> Network:
    """Return IPv4 for a block of v4-mapped addresses: connections show theirs as IPv4, too."""
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is None or network.prefixlen < MAPPED_BITS:
        return network
    return IPv4Network((mapped, network.prefixlen - MAPPED_BITS))


def _read_ports(items: list[Field], _namespace: str) -> ValueSet:
    return port_set(
        Field(int(text) if text.isascii() and text.isdecimal() else text, item.path).port()
        for item in items
        for text in (item.text(),)
    )


SOURCE: dict[str, tuple[Attribute, Read]] = {
    "principals": (Attribute.PRINCIPAL, _read_texts),
    "namespaces": (Attribute.NAMESPACE, _read_texts),
    "serviceAccounts": (Attribute.SERVICE_ACCOUNT, _read_accounts),
    "ipBlocks": (Attribute.SOURCE_ADDRESS, _read_networks),
}
OPERATION: dict[str, tuple[Attribute, Read]] = {"ports": (Attribute.DESTINATION_PORT, _read_ports)}
CONDITIONS: dict[str, tuple[Attribute, Read]] = {
    "source.principal": (Attribute.PRINCIPAL, _read_texts),
    "source.namespace": (Attribute.NAMESPACE, _read_texts),
    "source.serviceAccount": (Attribute.SERVICE_ACCOUNT, _read_accounts),
    "source.ip": (Attribute.SOURCE_ADDRESS, _read_networks),
    "destination.ip": (Attribute.DESTINATION_ADDRESS, _read_networks),
    "destination.port": (Attribute.DESTINATION_PORT, _read_ports),
}


def read_authorization_policy(body: Field, root_namespace: str) -> Policy:
    """Read an AuthorizationPolicy (WrongField if it cannot be used)."""
    key = _read_key(body, "AuthorizationPolicy")
    spec = body.get("spec")
    spec.only("selector", "targetRef", "targetRefs", "action", "rules")
    action = spec.get("action")
    word = action.text("ALLOW")
    if word in REFUSED_ACTIONS:
        raise action.wrong(f"{word} {REFUSED_ACTIONS[word]}")
    if word not in {*Action}:
        raise action.wrong(f"must be ALLOW or DENY, not {word!r}")
    targets = _read_targets(spec)
    if targets and spec.get("selector").value is not None:
        raise spec.get("selector").wrong("cannot be used beside targetRefs")
    reader = _RuleReader(Action(word), key.namespace)
    rules = spec.get("rules").excuse(reader.read_all, NO_RULES)
    warnings = [f"{each.path}: {each.detail}, and is left out" for each in body.excused]
    warnings += reader.warnings
    verb = "allows" if word == Action.ALLOW else "denies"
    if targets:
        shown = ", ".join(targets)
        warnings = [f"spec.targetRefs: a waypoint of {shown} enforces it, the pods here do not"]
    elif spec.get("rules").value and not rules:
        warnings.append(f"spec.rules: none is left, so this policy {verb} nothing")
    elif not rules and word == Action.DENY:
        warnings.append("spec.rules: there is none, so this policy denies nothing")
    return Policy(
        key,
        Action(word),
        _read_scope(body, key, root_namespace),
        rules,
        is_dry_run=_read_dry_run(body.get("metadata").get("annotations").get(DRY_RUN)),
        targets=targets,
        warnings=tuple(warnings),
    )


def read_peer_authentication(body: Field, root_namespace: str) -> PeerAuthentication:
    """Read a PeerAuthentication (WrongField if it cannot be used)."""
    key = _read_key(body, "PeerAuthentication")
    spec = body.get("spec")
    spec.only("selector", "mtls", "portLevelMtls")
    scope = _read_scope(body, key, root_namespace)
    warnings: list[str] = []
    mode = _read_mode(spec.get("mtls"), warnings)
    ports = []
    by_port = spec.get("portLevelMtls")
    for name, item in by_port.members():
        text = str(name)
        port = Field(int(text) if text.isascii() and text.isdecimal() else name, item.path).port()
        port_mode = _read_mode(item, warnings)
        if port_mode is not None:
            ports.append((port, port_mode))
    if ports and not scope.selector:
        warnings.append(f"{by_port.path}: is left out: it needs a selector, as ports differ by pod")
        ports.clear()
    if scope.selector and not scope.namespace:
        warnings.append("spec.selector: in the root namespace a policy that selects has no effect")
    return PeerAuthentication(
        key,
        scope,
        mode,
        tuple(sorted(ports)),
        read_created(body.get("metadata")),
        tuple(warnings),
    )


def _read_key(body: Field, kind: str) -> PolicyKey:
    metadata = body.get("metadata")
    namespace = metadata.get("namespace").name(LABEL_NAME, "default")
    name = metadata.get("name").name(SUBDOMAIN_NAME)
    if kind == "PeerAuthentication":
        return PolicyKey(namespace, name, "PeerAuthentication")
    return PolicyKey(namespace, name, "AuthorizationPolicy")


def _read_scope(body: Field, key: PolicyKey, root_namespace: str) -> Scope:
    selector = body.get("spec").get("selector")
    selector.only("matchLabels")
    labels = []
    for name, item in selector.get("matchLabels").members():
        if "*" in item.text() or "*" in str(name):
            raise item.wrong("must be a whole label, without *")
        labels.append((str(name), item.text()))
    return Scope("" if key.namespace == root_namespace else key.namespace, frozenset(labels))


def _read_targets(spec: Field) -> tuple[str, ...]:
    single = spec.get("targetRef")
    targets = [*spec.get("targetRefs").items(), *([single] if single.value is not None else [])]
    return tuple(f"{item.get('kind').text()} {item.get('name').text()}" for item in targets)


def _read_dry_run(annotation: Field) -> bool:
    text = annotation.text("")
    if text not in TRUE | FALSE:
        raise annotation.wrong(f"must be true or false, not {text!r}")
    return text in TRUE


def _read_mode(mtls: Field, warnings: list[str]) -> Mode | None:
    mtls.only("mode")
    field = mtls.get("mode")
    word = field.text("UNSET")
    if word == "UNSET":
        return None
    if word not in {*Mode}:
        raise field.wrong(f"must be UNSET, DISABLE, PERMISSIVE or STRICT, not {word!r}")
    if word == Mode.DISABLE:
        warnings.append(f"{field.path}: DISABLE is taken as PERMISSIVE: a tunnel is never refused")
    return Mode(word)


class _RuleReader:
    """Reads the rules of one policy and collects its warnings."""

    def __init__(self, action: Action, namespace: str) -> None:
        self._action = action
        self._namespace = namespace
        self.warnings: list[str] = []

    def read_all(self, rules: Field) -> tuple[Rule, ...]:
        """Read the rules that can be read and can match."""
        found = [
            rule.excuse(partial(self._read, position), None)
            for position, rule in enumerate(rules.items())
        ]
        return tuple(rule for rule in found if rule is not None)

    def _read(self, position: int, rule: Field) -> Rule | None:
        """Read one rule; None if it can never match."""
        if rule.value is None:
            raise rule.wrong("must be a mapping; {} stands for everything")
        rule.only("from", "to", "when")
        unseen: list[Field] = []
        clauses = [
            self._read_alternatives(rule.get("from"), "source", SOURCE, L7_SOURCE, unseen),
            self._read_alternatives(rule.get("to"), "operation", OPERATION, L7_OPERATION, unseen),
            *(self._read_condition(item, unseen) for item in rule.get("when").items()),
        ]
        if unseen and self._action is Action.ALLOW:
            self._warn(unseen, "so this rule never matches")
            return None
        if unseen:
            self._warn(unseen, "so it is left out, and more is denied than the rule says")
        return Rule(position, tuple(clause for clause in clauses if clause is not None))

    def _warn(self, unseen: Iterable[Field], consequence: str) -> None:
        self.warnings += [f"{field.path}: {UNSEEN}, {consequence}" for field in unseen]

    def _read_alternatives(
        self,
        clause: Field,
        member: str,
        known: dict[str, tuple[Attribute, Read]],
        l7_names: tuple[str, ...],
        unseen: list[Field],
    ) -> Clause | None:
        if clause.value is None:
            return None
        matches: list[Match] = []
        for item in clause.items():
            item.only(member)
            field = item.get(member)
            negations = {f"not{name[0].upper()}{name[1:]}": name for name in known}
            field.only(*known, *negations, *l7_names)
            found = [field.get(name) for name in l7_names if [*field.get(name).items()]]
            unseen += found
            terms = [
                self._read_term(field.get(name), *known[negations.get(name, name)], name)
                for name in (*known, *negations)
                if [*field.get(name).items()]
            ]
            if not terms and not found:
                raise field.wrong("must ask for something")
            matches.append(tuple(terms))
        if not matches:
            raise clause.wrong("must not be empty")
        # A match of which nothing is left would hold for all, and so would the clause.
        return Clause(clause.field_name, tuple(matches)) if all(matches) else None

    def _read_term(self, field: Field, attribute: Attribute, read: Read, name: str) -> Term:
        items, is_negated = [*field.items()], name.startswith("not")
        if self._action is Action.DENY:
            # The others are denied as written, and who is no exception any more is denied as well.
            items = [item for item in items if item.excuse(partial(self._can_read, read), False)]
            if not items and not is_negated:
                raise field.wrong("has no value that can be used")
        if attribute is Attribute.PRINCIPAL:
            self.warnings += [
                f"{item.path}: never matches: a principal is written without spiffe://"
                for item in items
                if item.text().startswith("spiffe://")
            ]
        return Term(attribute, read(items, self._namespace), is_negated)

    def _can_read(self, read: Read, item: Field) -> bool:
        read([item], self._namespace)
        return True

    def _read_condition(self, item: Field, unseen: list[Field]) -> Clause | None:
        item.only("key", "values", "notValues")
        key = item.get("key")
        lists = [name for name in ("values", "notValues") if [*item.get(name).items()]]
        if not lists:
            raise item.get("values").wrong("is required, or notValues")
        if key.text() not in CONDITIONS:
            if not key.text().startswith(L7_CONDITIONS):
                raise key.wrong(f"{key.text()!r} is not a condition")
            unseen.append(item)
            return None
        terms = tuple(
            self._read_term(item.get(name), *CONDITIONS[key.text()], name) for name in lists
        )
        return Clause(item.field_name, (terms,))

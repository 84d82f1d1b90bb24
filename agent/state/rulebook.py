"""The policies in force, and the verdict on one connection. Pure.

    1. plaintext, and the port's mode is STRICT     denied
    2. a rule of a DENY policy holds                denied
    3. no ALLOW policy applies to the pod           allowed
    4. a rule of an ALLOW policy holds              allowed
    5. otherwise                                    denied

A policy applies by its scope: the mesh (root namespace), its namespace, or the pods that it
selects. Policies in dry run decide nothing; the verdict tells what they would change.

A worker keeps one for the pods that it serves, the control process one to explain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.model.policy import Action, Mode, Policy, PolicyKey
from agent.model.verdict import Basis, Verdict
from agent.state.rule_table import RuleTable
from agent.state.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent.model.condition import Connection, Facts
    from agent.model.policy import AnyPolicy, Labels, PeerAuthentication

ALLOWED = Verdict(True, Basis.NO_POLICY)


class _Tables:
    """The rules of one scope, by action, enforced and dry run apart."""

    __slots__ = ("dry_run", "enforced")

    def __init__(self) -> None:
        self.enforced = {action: RuleTable() for action in Action}
        self.dry_run = {action: RuleTable() for action in Action}

    def of(self, policy: Policy) -> RuleTable:
        return (self.dry_run if policy.is_dry_run else self.enforced)[policy.action]

    @property
    def is_empty(self) -> bool:
        return not any(self.has_policies(tables) for tables in (self.enforced, self.dry_run))

    @staticmethod
    def has_policies(tables: dict[Action, RuleTable]) -> bool:
        return any(table.policies for table in tables.values())


class Rulebook:
    """Policies by name, and indexes to judge with."""

    def __init__(self) -> None:
        self._policies: dict[PolicyKey, AnyPolicy] = {}
        self._tables: Selection[_Tables] = Selection(_Tables)
        self._authentications: Selection[list[PeerAuthentication]] = Selection(list)

    def __iter__(self) -> Iterator[AnyPolicy]:
        return iter(self._policies.values())

    def get(self, key: PolicyKey) -> AnyPolicy | None:
        """Return a policy by its name."""
        return self._policies.get(key)

    def change(self, changes: Iterable[AnyPolicy | PolicyKey]) -> None:
        """Put the policies and remove those of which only the name is given."""
        for change in changes:
            if isinstance(change, PolicyKey):
                self.remove(change)
            else:
                self.put(change)

    def put(self, policy: AnyPolicy) -> None:
        """Add or replace a policy."""
        self.remove(policy.key)
        self._policies[policy.key] = policy
        if not policy.is_enforced_here:
            return
        if isinstance(policy, Policy):
            self._tables.at(policy.scope).of(policy).put(policy)
        else:
            found = self._authentications.at(policy.scope)
            found.append(policy)
            found.sort(key=lambda each: each.age)

    def remove(self, key: PolicyKey) -> None:
        """Forget a policy, if it is known."""
        known = self._policies.pop(key, None)
        if known is None or not known.is_enforced_here:
            return
        if isinstance(known, Policy):
            tables = self._tables.at(known.scope)
            tables.of(known).remove(key)
            if tables.is_empty:
                self._tables.drop(known.scope)
        else:
            found = self._authentications.at(known.scope)
            found.remove(known)
            if not found:
                self._authentications.drop(known.scope)

    def judge(self, namespace: str, labels: Labels, connection: Connection) -> Verdict:
        """Decide about a connection to a pod of `namespace` that has `labels`."""
        if connection.identity is None:
            strict = self.strict_at(namespace, labels, connection.port)
            if strict is not None:
                return Verdict(False, Basis.STRICT, strict)
        covering = self._tables.covering(namespace, labels)
        if not covering:
            return ALLOWED
        facts = connection.facts()
        verdict = _decide([tables.enforced for tables in covering], facts)
        dry_run = [tables.dry_run for tables in covering if _Tables.has_policies(tables.dry_run)]
        if dry_run:
            would_be = _decide([*(tables.enforced for tables in covering), *dry_run], facts)
            if would_be.is_allowed != verdict.is_allowed:
                return Verdict(
                    verdict.is_allowed, verdict.basis, verdict.policy, verdict.rule, would_be
                )
        return verdict

    def plaintext_ports(self, namespace: str, labels: Labels) -> frozenset[int] | None:
        """Return the only ports at which a pod takes plaintext; None if that is all but a few."""
        named = {
            port
            for group in self._authentications.covering(namespace, labels)
            for each in group
            for port, _mode in each.ports
        }
        # Port 0 is nobody's: what holds there holds at every port that is not named.
        if self.strict_at(namespace, labels, 0) is None:
            return None
        return frozenset(port for port in named if self.strict_at(namespace, labels, port) is None)

    def strict_at(self, namespace: str, labels: Labels, port: int) -> PolicyKey | None:
        """Name the PeerAuthentication that refuses plaintext at a pod's port; None if none does.

        Workload before namespace before mesh. In each the oldest counts; what it leaves open, the
        wider scope decides.
        """
        oldest: dict[int, PeerAuthentication] = {}
        for group in self._authentications.covering(namespace, labels):
            for each in group:
                level = _level(each)
                if level not in oldest or each.age < oldest[level].age:
                    oldest[level] = each
        for _, each in sorted(oldest.items()):
            mode = each.mode_at(port)
            if mode is not None:
                return each.key if mode is Mode.STRICT else None
        return None

    def applying(self, namespace: str, labels: Labels) -> list[AnyPolicy]:
        """List the policies whose scope covers a pod, in order; for people, so slowly."""
        return sorted(
            (
                policy
                for policy in self._policies.values()
                if policy.is_enforced_here and policy.scope.covers(namespace, labels)
            ),
            key=lambda policy: policy.key,
        )


def _level(policy: PeerAuthentication) -> int:
    if policy.scope.selector:
        return 0
    return 1 if policy.scope.namespace else 2


def _decide(groups: list[dict[Action, RuleTable]], facts: Facts) -> Verdict:
    denied = _first(Action.DENY, groups, facts)
    if denied is not None:
        return denied
    allowing = [group[Action.ALLOW] for group in groups if group[Action.ALLOW].policies]
    if not allowing:
        return ALLOWED
    allowed = _first(Action.ALLOW, groups, facts)
    if allowed is not None:
        return allowed
    return Verdict(False, Basis.NOT_ALLOWED, min(table.policies[0] for table in allowing))


def _first(
    action: Action, groups: Iterable[dict[Action, RuleTable]], facts: Facts
) -> Verdict | None:
    firsts = [first for group in groups if (first := group[action].first(facts)) is not None]
    if not firsts:
        return None
    namespace, name, position = min(firsts)
    key = PolicyKey(namespace, name, "AuthorizationPolicy")
    return Verdict(action is Action.ALLOW, Basis.RULE, key, position)

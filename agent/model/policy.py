"""Policies as values: who may connect to whom, and where plaintext is refused. Pure.

    Policy                 an AuthorizationPolicy: ALLOW or DENY, rules, a scope
    Rule                   holds if every clause holds; without clauses it always does
    Clause                 `from`, `to` or one item of `when`: holds if one of its matches holds
    Match                  holds if every term holds
    PeerAuthentication     whether plaintext is refused, for a scope, by port if need be

A policy without rules never matches; as an ALLOW it therefore lets nothing in. `position` of a rule
is its place in the object, also when rules before it were left out.

Judging is in `agent.state.rulebook`, reading the objects in `agent.discovery.policies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from agent.model.age import age

if TYPE_CHECKING:
    from agent.model.condition import Facts, Term

Labels = frozenset[tuple[str, str]]
Match = tuple["Term", ...]
NO_LABELS: Labels = frozenset()


class Action(StrEnum):
    """What a policy does with what it matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"


class Mode(StrEnum):
    """What a PeerAuthentication asks for; without one the wider scope decides."""

    STRICT = "STRICT"
    PERMISSIVE = "PERMISSIVE"
    DISABLE = "DISABLE"


@dataclass(frozen=True, slots=True, order=True)
class PolicyKey:
    """The name of a policy; among several that decide alike, the first in this order is named."""

    namespace: str
    name: str
    kind: Literal["AuthorizationPolicy", "PeerAuthentication"]

    def __reduce__(self) -> Any:
        return PolicyKey, (self.namespace, self.name, self.kind)

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose inbound connections a policy is about; an empty namespace means every one."""

    namespace: str = ""
    selector: Labels = NO_LABELS

    def __reduce__(self) -> Any:
        return Scope, (self.namespace, self.selector)

    def covers(self, namespace: str, labels: Labels) -> bool:
        """Tell whether a pod is in the scope."""
        return self.namespace in ("", namespace) and self.selector <= labels

    def __str__(self) -> str:
        place = f"namespace {self.namespace}" if self.namespace else "the mesh"
        pairs = ", ".join(f"{key}={value}" for key, value in sorted(self.selector))
        return f"pods of {place} with {pairs}" if pairs else f"all pods of {place}"


@dataclass(frozen=True, slots=True)
class Clause:
    """A condition of a rule; `field` says where it stands in the rule."""

    field: str
    matches: tuple[Match, ...]

    def __reduce__(self) -> Any:
        return Clause, (self.field, self.matches)

    def holds(self, facts: Facts) -> bool:
        """Tell whether one of the matches holds."""
        for match in self.matches:
            for term in match:
                if not term.holds(facts):
                    break
            else:
                return True
        return False


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a policy."""

    position: int
    clauses: tuple[Clause, ...] = ()

    def __reduce__(self) -> Any:
        return Rule, (self.position, self.clauses)

    def holds(self, facts: Facts) -> bool:
        """Tell whether every clause holds."""
        return all(clause.holds(facts) for clause in self.clauses)


@dataclass(frozen=True, slots=True)
class Policy:
    """An AuthorizationPolicy.

    `targets` names what it is attached to by targetRefs; such a policy is a waypoint's to enforce.
    """

    key: PolicyKey
    action: Action
    scope: Scope
    rules: tuple[Rule, ...]
    is_dry_run: bool = False
    targets: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __reduce__(self) -> Any:
        arguments = (self.key, self.action, self.scope, self.rules)
        return Policy, (*arguments, self.is_dry_run, self.targets, self.warnings)

    @property
    def is_enforced_here(self) -> bool:
        """Whether pods' own connections are judged by it."""
        return not self.targets


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """A PeerAuthentication; `mode` None leaves the choice to the wider scope.

    `created` orders two of one scope: the older one counts.
    """

    key: PolicyKey
    scope: Scope
    mode: Mode | None
    ports: tuple[tuple[int, Mode], ...] = ()
    created: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def is_enforced_here(self) -> bool:
        """Whether it counts; as in Istio, one of the whole mesh cannot select pods."""
        return bool(self.scope.namespace) or not self.scope.selector

    @property
    def age(self) -> tuple[bool, str, str]:
        """Sort by this for the oldest first."""
        return (*age(self.created), self.key.name)

    def mode_at(self, port: int) -> Mode | None:
        """Return what it says of a port."""
        return dict(self.ports).get(port, self.mode)


AnyPolicy = Policy | PeerAuthentication

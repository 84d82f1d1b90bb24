"""The rules of many policies, found by what a connection looks like. Pure.

A rule holds only if each of its clauses does. So it is enough to file it under one clause, and
under one term of each match of that clause: a connection that has none of those values cannot match
the rule. Of several clauses the one whose drawers are emptiest is taken, so that a thousand rules
for one principal are told apart by their ports.

A clause that only negates is no place to file under. It becomes the guard of the drawers, which is
tested once for all rules that have it. The drawers keep the order of policy and position: the first
rule that holds is the one that a walk through all policies in order would find.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.model.condition import Attribute, NetworkSet, TextSet

if TYPE_CHECKING:
    from agent.model.condition import Fact, Facts, Term
    from agent.model.policy import Clause, Match, Policy, PolicyKey, Rule

Order = tuple[str, str, int]  # namespace and name of the policy, position of the rule
Entry = tuple[Order, "Rule"]
Drawer = list[Entry]


class Form(IntEnum):
    """How a fact becomes the value under which rules are filed."""

    WHOLE = 0
    PREFIX = 1
    SUFFIX = 2
    ANY = 3
    NETWORK4 = 4
    NETWORK6 = 5
    ALWAYS = 6  # no value is asked for, only the guard


class Probe(NamedTuple):
    """One way to look a connection up; `size` is a length in characters or in host bits."""

    attribute: Attribute
    form: Form
    size: int = 0
    guard: tuple[Match, ...] = ()

    def value(self, facts: Facts) -> Fact:
        """Return what to look up; None if the connection has no such value."""
        fact: Any = facts[self.attribute]
        if fact is None:
            return None
        match self.form:
            case Form.WHOLE:
                return fact  # type: ignore[no-any-return]  # a fact
            case Form.PREFIX:
                return fact[: self.size] if len(fact) >= self.size else None
            case Form.SUFFIX:
                return fact[len(fact) - self.size :] if len(fact) >= self.size else None
            case Form.NETWORK4 | Form.NETWORK6:
                version, number = fact
                wanted = 4 if self.form is Form.NETWORK4 else 6
                return number >> self.size if version == wanted else None
            case _:
                return ""


WHOLE = [Probe(attribute, Form.WHOLE) for attribute in Attribute]
NETWORKS = {4: Form.NETWORK4, 6: Form.NETWORK6}
Place = tuple[Probe, "Fact"]


def _places_of_term(term: Term, guard: tuple[Match, ...]) -> list[Place]:
    values, attribute = term.values, term.attribute
    if isinstance(values, NetworkSet):
        return [
            (Probe(attribute, NETWORKS[version], host_bits, guard), number)
            for version, host_bits, numbers in values.blocks
            for number in numbers
        ]
    whole = Probe(attribute, Form.WHOLE, 0, guard) if guard else WHOLE[attribute]
    if not isinstance(values, TextSet):
        return [(whole, port) for port in values.ports]
    if values.is_any:
        return [(Probe(attribute, Form.ANY, 0, guard), "")]
    if not values.prefixes and not values.suffixes:
        return [(whole, text) for text in values.exact]
    return [
        *((whole, text) for text in values.exact),
        *((Probe(attribute, Form.PREFIX, len(text), guard), text) for text in values.prefixes),
        *((Probe(attribute, Form.SUFFIX, len(text), guard), text) for text in values.suffixes),
    ]


class RuleTable:
    """The rules of the policies of one scope and one action."""

    __slots__ = ("_drawers", "_places", "policies")

    def __init__(self) -> None:
        self._drawers: dict[Probe, dict[Fact, Drawer]] = {}
        self._places: dict[PolicyKey, list[tuple[Place, Order]]] = {}
        self.policies: list[PolicyKey] = []  # in order

    def put(self, policy: Policy) -> None:
        """Add a policy that is not there."""
        key = policy.key
        places = self._places[key] = []
        insort(self.policies, key)
        for rule in policy.rules:
            order = (key.namespace, key.name, rule.position)
            for place in self._choose(rule):
                probe, value = place
                drawer = self._drawers.setdefault(probe, {}).setdefault(value, [])
                insort(drawer, (order, rule))
                places.append((place, order))

    def remove(self, key: PolicyKey) -> None:
        """Take out a policy that is there."""
        del self.policies[bisect_left(self.policies, key)]
        for (probe, value), order in self._places.pop(key):
            drawers = self._drawers[probe]
            drawer = drawers[value]
            del drawer[bisect_left(drawer, (order,))]
            if not drawer:
                del drawers[value]
                if not drawers:
                    del self._drawers[probe]

    def first(self, facts: Facts) -> Order | None:
        """Return the first rule, in order, that holds."""
        best: Order | None = None
        for probe, drawers in self._drawers.items():
            value = probe.value(facts)
            drawer = None if value is None else drawers.get(value)
            if drawer and (best is None or drawer[0][0] < best):
                guard = probe.guard
                if not guard or any(all(term.holds(facts) for term in match) for match in guard):
                    best = _first_in(drawer, facts, best)
        return best

    def _choose(self, rule: Rule) -> set[Place]:
        """Choose where to file a rule: the clause with the emptiest drawers."""
        guard: tuple[Match, ...] = ()
        fileable = []
        for clause in rule.clauses:
            if _is_fileable(clause):
                fileable.append(clause)
            else:
                guard = guard or clause.matches
        if not fileable:
            return {(Probe(Attribute.DESTINATION_PORT, Form.ALWAYS, guard=guard), "")}
        if len(fileable) == 1 and all(len(match) == 1 for match in fileable[0].matches):
            # Nearly every rule of many: there is nothing to choose.
            terms = (match[0] for match in fileable[0].matches)
            return {place for term in terms for place in _places_of_term(term, guard)}
        fullness, places = self._places_of(fileable[0], guard)
        for clause in fileable[1:]:
            if not fullness:
                break  # no clause does better than empty drawers
            option = self._places_of(clause, guard)
            if option[0] < fullness:
                fullness, places = option
        return places

    def _places_of(self, clause: Clause, guard: tuple[Match, ...]) -> tuple[int, set[Place]]:
        """Return the places of a clause, one term of each match, and how full the fullest is."""
        fullest, chosen = 0, set()
        for match in clause.matches:
            options = []
            for term in match:
                if not term.is_negated:
                    places = _places_of_term(term, guard)
                    options.append((max([self._size(place) for place in places]), places))
            size, places = min(options, key=_fullness) if len(options) > 1 else options[0]
            fullest = max(fullest, size)
            chosen.update(places)
        return fullest, chosen

    def _size(self, place: Place) -> int:
        drawers = self._drawers.get(place[0])
        return len(drawers.get(place[1], ())) if drawers else 0


def _is_fileable(clause: Clause) -> bool:
    """Tell whether every match asks for a value, and does not only negate."""
    for match in clause.matches:
        for term in match:
            if not term.is_negated:
                break
        else:
            return False
    return True


def _fullness(option: tuple[int, Any]) -> int:
    return option[0]


def _first_in(drawer: Drawer, facts: Facts, best: Order | None) -> Order | None:
    for order, rule in drawer:
        if best is not None and order >= best:
            break
        if rule.holds(facts):
            return order
    return best

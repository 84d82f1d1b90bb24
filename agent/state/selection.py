"""Things kept by scope, and those whose scope covers a pod, without a look at the others. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.model.policy import Labels, Scope

Item = TypeVar("Item")
Pair = tuple[str, str]


class Selection(Generic[Item]):
    """One item for each scope that is in use.

    A selector is filed under one of its labels, the one that fewest others are filed under: a pod
    without that label is not selected.
    """

    def __init__(self, make: Callable[[], Item]) -> None:
        self._make = make
        self._unselective: dict[str, Item] = {}
        self._by_label: dict[str, dict[Pair, dict[Labels, Item]]] = {}
        self._pairs: dict[Scope, Pair] = {}

    def at(self, scope: Scope) -> Item:
        """Return the item of a scope, a new one if there was none."""
        if not scope.selector:
            found = self._unselective.get(scope.namespace)
            if found is None:
                found = self._unselective[scope.namespace] = self._make()
            return found
        by_pair = self._by_label.setdefault(scope.namespace, {})
        pair = self._pairs.get(scope)
        if pair is None:
            pair = min(sorted(scope.selector), key=lambda label: len(by_pair.get(label, ())))
            self._pairs[scope] = pair
        items = by_pair.setdefault(pair, {})
        found = items.get(scope.selector)
        if found is None:
            found = items[scope.selector] = self._make()
        return found

    def drop(self, scope: Scope) -> None:
        """Forget the item of a scope that has one."""
        if not scope.selector:
            del self._unselective[scope.namespace]
            return
        pair = self._pairs.pop(scope)
        by_pair = self._by_label[scope.namespace]
        del by_pair[pair][scope.selector]
        if not by_pair[pair]:
            del by_pair[pair]
        if not by_pair:
            del self._by_label[scope.namespace]

    def covering(self, namespace: str, labels: Labels) -> list[Item]:
        """List the items whose scope covers a pod, in no order."""
        found = []
        for place in ("", namespace):
            item = self._unselective.get(place)
            if item is not None:
                found.append(item)
            by_pair = self._by_label.get(place)
            if by_pair:
                for label in labels:
                    for selector, item in by_pair.get(label, {}).items():
                        if selector <= labels:
                            found.append(item)
        return found

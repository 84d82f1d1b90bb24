"""What differs between the entries that ought to be somewhere and those that are. Pure.

Keys and values are whatever both sides use; only equality counts. Called by `agent.inspection`,
once for each map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Drift(Generic[Key, Value]):
    """One entry that is missing (`found` is None), surplus (`expected` is None) or another."""

    key: Key
    expected: Value | None
    found: Value | None


def compare(
    expected: Mapping[Key, Value], observed: Mapping[Key, Value]
) -> list[Drift[Key, Value]]:
    """List the differences, those of expected entries first, each group in its own order."""
    missing = [
        Drift(key, value, observed.get(key))
        for key, value in expected.items()
        if observed.get(key) != value
    ]
    surplus = [Drift(key, None, value) for key, value in observed.items() if key not in expected]
    return [*missing, *surplus]

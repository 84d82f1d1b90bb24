"""What a worker counts, until it tells the control process. Pure.

A count has a name and labels, as the metric that it becomes (`agent.metrics`). There is one
registry for each worker process, as logs have one stream: what counts stands deep below what sends.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

Labels = tuple[tuple[str, str], ...]
Counted = tuple[tuple[str, Labels, int], ...]


class Counts:
    """Additions since the last `take`; `on_first` is called when the first one comes."""

    def __init__(self) -> None:
        self._counts = Counter[tuple[str, Labels]]()
        self.on_first: Callable[[], None] = lambda: None

    def add(self, name: str, amount: int = 1, /, **labels: str) -> None:
        """Count something."""
        self.put(name, tuple(sorted(labels.items())), amount)

    def put(self, name: str, labels: Labels, amount: int = 1) -> None:
        """Count something whose labels are sorted already."""
        is_first = not self._counts
        self._counts[name, labels] += amount
        if is_first:
            self.on_first()

    def take(self) -> Counted:
        """Return and forget."""
        taken = tuple((name, labels, count) for (name, labels), count in self._counts.items())
        self._counts.clear()
        return taken


COUNTS = Counts()

"""How much memory something keeps, of what Python gives out."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def allocated(action: Callable[[], object]) -> int:
    """Return how many bytes more are in use after `action` than before."""
    tracemalloc.start()
    try:
        before, _peak = tracemalloc.get_traced_memory()
        action()
        after, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before

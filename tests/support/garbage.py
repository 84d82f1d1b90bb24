"""What the collector of cyclic garbage would have to free."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def _name(found: object) -> str:
    named = found if isinstance(found, FunctionType | MethodType) else type(found)
    return f"{named.__module__}.{named.__qualname__}"


@contextmanager
def no_cyclic_garbage() -> Iterator[None]:
    """Let the block's objects of the agent go by reference counting alone."""
    gc.collect()
    flags = gc.get_debug()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = Counter(name for each in gc.garbage if (name := _name(each)).startswith("agent."))
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.enable()
    assert not found

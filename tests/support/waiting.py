"""Wait in a test for what another process does and tells nobody."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_SECONDS = 0.02


def wait_until(
    condition: Callable[[], object], seconds: float = 20.0, what: object = "it never happened"
) -> None:
    """Look again and again until it is so (AssertionError if never).

    `what` is said then; a callable is asked for it.
    """
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what() if callable(what) else what
        time.sleep(LOOK_SECONDS)

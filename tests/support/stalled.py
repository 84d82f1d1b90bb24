"""Somebody whose bytes nobody takes, for the worker's account of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.tunnel.buffers import Share


class Stalled:
    """Keeps bytes until it is told otherwise."""

    is_shared = False

    def __init__(self, share: Share) -> None:
        self.buffered = 0
        self._share = share

    def keep(self, count: int) -> None:
        """Keep so many more, or fewer."""
        self.buffered += count
        self._share.change(self, count)

    def give_up(self) -> None:
        """Forget them."""
        self.keep(-self.buffered)

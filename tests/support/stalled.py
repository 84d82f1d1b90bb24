"""Somebody whose bytes nobody takes, for the worker's account of them."""

from __future__ import annotations

from agent.tunnel.buffers import BUFFERS


class Stalled:
    """Keeps bytes until it is told otherwise."""

    is_shared = False

    def __init__(self) -> None:
        self.buffered = 0

    def keep(self, count: int) -> None:
        """Keep so many more, or fewer."""
        self.buffered += count
        BUFFERS.change(self, count)

    def give_up(self) -> None:
        """Forget them."""
        self.keep(-self.buffered)

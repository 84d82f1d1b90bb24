"""Where this process spends processor time: the stacks that a timer finds.

The timer counts processor time, so a process that waits is not disturbed and gives no samples. The
signal is taken between two bytecodes of the main thread, and its stack is what is counted: the
other threads of an agent wait. One sampler at a time, made on the main thread.
"""

from __future__ import annotations

import signal
from collections import Counter
from typing import TYPE_CHECKING

from agent.model.stacks import Frame

if TYPE_CHECKING:
    from types import FrameType

    from agent.model.stacks import Stacks

DEEPEST = 64


class Sampler:
    """Collects from the constructor to `stop`."""

    def __init__(self, frequency: int) -> None:
        """Take up to `frequency` samples for each second of processor time."""
        self._found = Counter[tuple[Frame, ...]]()
        self._before = signal.signal(signal.SIGPROF, self._take)
        signal.setitimer(signal.ITIMER_PROF, 1 / frequency, 1 / frequency)

    def _take(self, _number: int, frame: FrameType | None) -> None:
        self._found[_walk(frame)] += 1

    def stop(self) -> Stacks:
        """End, and return what was found."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)
        return tuple(self._found.items())


def _walk(frame: FrameType | None) -> tuple[Frame, ...]:
    stack: list[Frame] = []
    while frame is not None and len(stack) < DEEPEST:
        code = frame.f_code
        stack.append((code.co_qualname, code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(stack)

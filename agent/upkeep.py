"""Look all the time whether the kernel still holds what it ought to, and mend what does not.

    each time                pins and links: what capture rests on, one call into the kernel each
    when the kernel tells    filters of tc, where there is no tcx (rtnetlink)
    one after the other      the entries of a map, or all of a pod: rules, routes, listeners, ...;
                             with few pods not each time, so that a round takes ROUND_LOOKS

What differs is found and mended as `sidestep check --repair` does it (`agent.inspection`). Who
takes away the same thing again and again is answered later and later (`agent.state.patience`), and
that is said: in the log, and to `on_contested`. A pod that is not enrolled is the roster's to try
again.

Called by the composition root, while this agent is the node's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from agent import netlink
from agent.datapath import features
from agent.errors import Contested, NetlinkError, SidestepError
from agent.state.patience import Patience

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from agent.inspection import Finding, Inspection
    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
ROUND_LOOKS = 60
Key = tuple[str | None, str, str]  # of a finding


class Upkeep:
    """Keeps one node as it ought to be."""

    def __init__(
        self,
        inspection: Inspection,
        turn: asyncio.Lock,
        is_settled: Callable[[], bool],
        seconds: float,
        on_counts: Callable[[Counted], None],
        on_contested: Callable[[dict[str | None, str]], None],
    ) -> None:
        """Prepare.

        `turn` is held while something is looked at and mended, `seconds` are between two looks.
        `is_settled()` says that nobody is about to bring new state into the maps.
        `on_contested(texts)` when it changes what cannot be kept, by pod; None is for the node.
        """
        self._inspection = inspection
        self._turn = turn
        self._is_settled = is_settled
        self._seconds = seconds
        self._on_counts = on_counts
        self._on_contested = on_contested
        self._patience = Patience[Key]()
        self._contested: dict[str | None, str] = {}
        self._parts: Iterator[list[Finding]] = iter(())
        self._looks_to_part = 0
        self._touched: set[int] = set()  # interfaces
        self._wake = asyncio.Event()
        self._is_over = False

    async def run(self) -> None:
        """Look and mend until `stop`."""
        with self._following_filters():
            while not self._is_over:
                async with self._turn:
                    if not self._is_over:
                        await self._look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        await self._wake.wait()
                self._wake.clear()

    def stop(self) -> None:
        """Mend nothing any more: what is missing from now on is meant to be."""
        self._is_over = True
        self._wake.set()

    async def _look(self) -> None:
        """Look once, and mend."""
        touched, self._touched = self._touched, set()
        try:
            found = self._inspection.find_lost(touched)
            if self._is_settled():
                found += self._next_part()
        except (SidestepError, OSError) as error:
            # What cannot be looked at at this moment, such as a pod that just ends, can be later.
            log.warning("upkeep could not look", extra={"error": str(error)})
            return
        for finding in {each.key: each for each in found}.values():
            now = asyncio.get_running_loop().time()
            if self._patience.is_due(finding.key, now):
                self._patience.note(finding.key, now)
                await self._mend(finding)
        self._tell_contested()

    def _next_part(self) -> list[Finding]:
        self._looks_to_part -= 1
        if self._looks_to_part > 0:
            return []
        self._looks_to_part = ROUND_LOOKS // self._inspection.part_count
        part = next(self._parts, None)
        if part is None:
            self._parts = self._inspection.parts()
            part = next(self._parts)
        return part

    async def _mend(self, finding: Finding) -> None:
        fields = {
            "pod": finding.pod,
            "what": f"{finding.kind} {finding.name}",
            "expected": finding.expected,
            "found": finding.found,
        }
        try:
            await finding.mend()
        except (SidestepError, OSError) as error:
            outcome = "failed"
            log.error("not mended", extra=fields | {"error": str(error)})
        else:
            outcome = "mended"
            log.warning("mended", extra=fields)
        self._on_counts((("repairs", (("kind", finding.kind), ("outcome", outcome)), 1),))

    def _tell_contested(self) -> None:
        now = asyncio.get_running_loop().time()
        contested: dict[str | None, str] = {}
        for (pod, kind, name), tries in self._patience.contested(now).items():
            text = f"{kind} {name} had to be mended {tries} times in a row: who takes it away?"
            contested[pod] = f"{contested[pod]}; {text}" if pod in contested else text
        if contested.keys() != self._contested.keys():
            for pod, text in contested.items():
                if pod not in self._contested:
                    fields = {"pod": pod, "error": text, "reason": Contested.reason}
                    log.error("mended too often, tried later and later", extra=fields)
            self._contested = contested
            self._on_contested(contested)

    # -- filters of tc ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _following_filters(self) -> Iterator[None]:
        if features.has_tcx():
            yield
            return
        events = netlink.open_filter_events()
        loop = asyncio.get_running_loop()
        loop.add_reader(events, self._on_filters, events)
        try:
            yield
        finally:
            loop.remove_reader(events)
            events.close()

    def _on_filters(self, events: socket.socket) -> None:
        try:
            self._touched |= netlink.gone_filters(events)
        except NetlinkError as error:
            # The round over the pods finds what was missed.
            log.warning("upkeep did not hear all", extra={"error": str(error)})
        if self._touched:
            self._wake.set()

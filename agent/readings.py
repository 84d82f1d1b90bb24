"""What a scrape reads at that moment: from workers, the kernel, the roster and the certificates.

Counters that workers send by themselves are `agent.tally`'s; names and meanings are those of
`agent.metrics`. Called by the composition root, for `agent.metrics`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from agent.datapath import listing
from agent.elders import read_counts
from agent.metrics import families, gauge_families, understood
from agent.tunnel import messages

if TYPE_CHECKING:
    from pathlib import Path

    from prometheus_client import Metric

    from agent.credentials import Credentials
    from agent.direct import DirectPath
    from agent.elders import Elders
    from agent.fleet import Fleet
    from agent.roster import Roster
    from agent.tunnel.counts import Counted

GAUGE_SECONDS = 2.0  # for a worker to say what it has; a scrape does not wait longer


async def read_gauges(fleet: Fleet) -> list[Counted]:
    """Ask the workers for what they have at this moment."""
    answers = await fleet.ask(messages.AskGauges, GAUGE_SECONDS)
    return [each.counts for each in answers.values() if isinstance(each, messages.Gauges)]


async def read(
    fleet: Fleet,
    roster: Roster,
    direct: DirectPath,
    elders: Elders,
    credentials: Credentials,
    pin_directory: Path,
    version: str,
) -> list[Metric]:
    """Return the families of what there is now; a worker that does not answer is left out."""
    gauges = await read_gauges(fleet)
    gauges += [understood(read_counts(answer)) for answer in await elders.ask("gauges")]
    gauges.append((direct.gauge(),))
    keeper = credentials.keeper
    counters = keeper.counters
    # Walking large maps takes a while, in which this process has other things to do.
    pods = await asyncio.to_thread(listing.list_pods, pin_directory)
    captures = await asyncio.to_thread(listing.dump_map, pin_directory, "ss_captures")
    maps = await asyncio.to_thread(listing.list_maps, pin_directory)
    statuses = [
        (status.pod.namespace, status.pod.name, status.state, status.reason)
        for status in roster.statuses.values()
    ]
    return [
        *gauge_families(gauges),
        *families(
            keeper.expiries(),
            {"issued": counters.issued, **counters.failed},
            statuses,
            roster.failures,
            pods,
            captures,
            maps,
            (len(fleet.pids), fleet.replaced),
            direct.lost,
            version,
        ),
    ]

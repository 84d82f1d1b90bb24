"""The CA process: build the parts, follow the cluster's state and the key's store, sign.

store -> authority ----+-> roots, published
tokens -> caller ------+-> service on gRPC
objects -> placement --+

It listens only when it knows the pods, so whoever can connect is answered.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from agent import readiness
from agent.errors import ConfigError, SidestepError
from agent.identity.custody import open_authority
from agent.identity.service import CertificateService, ServerCredentials, Terms, start_server
from agent.state.placement import Placement
from agent.state.store import Snapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import timedelta
    from typing import Protocol

    from agent.identity.custody import Store
    from agent.identity.service import Authenticator
    from agent.model.identity import SpiffeId

    class Source(Protocol):
        """Where the cluster's state comes from."""

        def watch(self, stop: asyncio.Event) -> AsyncIterator[Snapshot]:
            """Yield the state now and after each change."""
            ...

    Publish = Callable[[str], None]  # the roots, PEM; raises SidestepError


log = logging.getLogger(__name__)
# A pod that was scheduled a moment ago may not have reached us, though its agent asks already.
PATIENCE_SECONDS = 1.0
# As many as an agent has requests in flight: one that asks for what is not his holds up nobody.
MOST_WAITING = 8
GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class CaSettings:
    """What an operator decides of the CA."""

    listen: str
    hosts: tuple[str, ...]
    trust_domain: str
    longest: timedelta


class FollowedPlacement:
    """The newest placement; waits a little for what it does not know yet."""

    def __init__(self) -> None:
        self._placement = Placement(Snapshot())
        self._changed = asyncio.Condition()
        self._waiting: Counter[str] = Counter()

    async def put(self, snapshot: Snapshot) -> None:
        async with self._changed:
            self._placement = Placement(snapshot)
            self._changed.notify_all()

    async def runs_on(self, node: str, identity: SpiffeId) -> bool:
        """Whether a pod with that identity is scheduled on the node."""
        if self._placement.runs_on(node, identity) or self._waiting[node] >= MOST_WAITING:
            return self._placement.runs_on(node, identity)
        self._waiting[node] += 1
        try:
            async with asyncio.timeout(PATIENCE_SECONDS), self._changed:
                await self._changed.wait_for(lambda: self._placement.runs_on(node, identity))
        except TimeoutError:
            return False
        finally:
            self._waiting[node] -= 1
        return True


async def run(
    settings: CaSettings,
    store: Store,
    authenticator: Authenticator,
    source: Source,
    publish: Publish,
) -> None:
    """Serve until SIGTERM or SIGINT (SidestepError at the start: nothing is served by halves).

    `publish` is told the trusted roots now and whenever they change.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    entries = await asyncio.to_thread(store.read)
    authority = await asyncio.to_thread(open_authority, store, settings.trust_domain)
    await asyncio.to_thread(publish, authority.bundle)
    placement = FollowedPlacement()
    snapshots = source.watch(stop)
    first = await anext(snapshots, None)
    if first is None:
        return
    await placement.put(first)
    service = CertificateService(
        authority, authenticator, placement, Terms(settings.trust_domain, settings.longest)
    )
    hosts, addresses = split_hosts(settings.hosts)
    credentials = ServerCredentials(service, hosts, addresses)
    try:
        server = await start_server(service, credentials, settings.listen)
    except RuntimeError as error:
        raise ConfigError(f"--listen {settings.listen}: {error}") from error
    log.info(
        "CA serves",
        extra={"listen": settings.listen, "root": f"{authority.roots[0].serial_number:x}"},
    )

    readiness.notify()

    async def follow_source() -> None:
        async for snapshot in snapshots:
            await placement.put(snapshot)

    async def follow_store() -> None:
        before = entries
        async for _ in store.changes(stop):
            try:
                now = await asyncio.to_thread(store.read)
                if now == before:
                    continue
                changed = await asyncio.to_thread(open_authority, store, settings.trust_domain)
                await asyncio.to_thread(publish, changed.bundle)
                service.authority = changed
            except SidestepError as error:
                # Read between two writes of a rotation, or wrong, or not to be published now: what
                # is in memory goes on.
                log.error(
                    "a changed key or root is not used yet",
                    extra={"reason": error.reason, "detail": str(error)},
                )
                continue
            before = now
            roots = [f"{root.serial_number:x}" for root in service.authority.roots]
            signer = f"{service.authority.certificate.serial_number:x}"
            log.info("CA's key or roots changed", extra={"roots": roots, "signs": signer})

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow_source())
            tasks.create_task(follow_store())
    finally:
        await server.stop(GRACE_SECONDS)


def split_hosts(hosts: tuple[str, ...]) -> tuple[list[str], list[IPv4Address | IPv6Address]]:
    """Tell DNS names from addresses."""
    names: list[str] = []
    addresses: list[IPv4Address | IPv6Address] = []
    for host in hosts:
        try:
            addresses.append(ip_address(host))
        except ValueError:
            names.append(host)
    return names, addresses

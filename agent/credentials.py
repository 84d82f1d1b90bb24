"""The identities of this node's pods: asked for, given to the workers, taken back.

Called by the composition root: `want` with each state, `run` for as long as the agent lives.
Certificates are kept by `agent.identity.keeper`; which identities there are is said here.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

from agent.identity.client import AuthorityClient
from agent.identity.keeper import CertificateKeeper
from agent.model.identity import SpiffeId, parse_spiffe_id
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.fleet import Fleet, Told
    from agent.identity.issuer import Certificate
    from agent.settings import Settings


class Credentials:
    """Certificates and revocations, for the workers of one agent."""

    def __init__(self, settings: Settings, fleet: Fleet, on_change: Callable[[], None]) -> None:
        """Want nothing yet; `on_change()` when there is something new to show."""
        asked = settings.authority
        self._client = AuthorityClient(
            asked.address, asked.server_name, asked.token, asked.roots, asked.lifetime_seconds
        )
        self.keeper = CertificateKeeper(self._client, asked.roots, settings.revoked, random.random)
        self.keeper.on_certificate = self._on_certificate
        self.keeper.on_change = on_change
        self._fleet = fleet
        self._wanted: set[SpiffeId] = set()
        self._received = asyncio.Event()

    async def run(self, stop: asyncio.Event, on_revoked: Callable[[], None]) -> None:
        """Issue and renew until `stop`; `on_revoked()` when other certificates are revoked."""
        self.keeper.on_revoked = lambda _fingerprints: on_revoked()
        try:
            await self.keeper.run(stop)
        finally:
            self.keeper.on_change = lambda: None
            await self._client.close()

    def want(self, identities: set[SpiffeId]) -> None:
        """Ask for what is new of them."""
        for identity in identities - self._wanted:
            self.keeper.want(identity, is_waiting=False)
        self._wanted |= identities

    async def wait_complete(self, identities: set[SpiffeId]) -> None:
        """Wait until there is a certificate for each of these, which are wanted."""
        while identities - {issued.identity for issued, _roots in self.keeper.certificates()}:
            self._received.clear()
            await self._received.wait()

    def forget_others(self, identities: set[SpiffeId]) -> None:
        """Forget what is not among them."""
        for identity in self._wanted - identities:
            self.keeper.forget(identity)
            self._fleet.tell(messages.RemoveCertificate(str(identity)))
        self._wanted &= identities

    def hurry(self, identity: str) -> None:
        """Ask for an identity before others: a connection waits for it."""
        found = parse_spiffe_id(identity)
        if found in self._wanted:  # else its last pod went meanwhile
            self.keeper.want(found, is_waiting=True)

    def introduction(self) -> Iterator[Told]:
        """Yield what a new worker has to be told."""
        yield from self._revoked()
        for issued, roots in self.keeper.certificates():
            yield _put(issued, roots), []

    def tell_revoked(self) -> None:
        """Tell the workers which certificates are revoked."""
        for message, fds in self._revoked():
            self._fleet.tell(message, fds)

    def describe(self) -> dict[str, object]:
        """Say how each identity fares, as `sidestep certs` shows it."""
        return self.keeper.describe()

    def _revoked(self) -> Iterator[Told]:
        # By descriptor, since a list can be longer than a message.
        fd = os.memfd_create("revoked", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(b"".join(sorted(self.keeper.revoked)))
            yield messages.PutRevoked(), [fd]
        finally:
            os.close(fd)

    def _on_certificate(self, issued: Certificate, roots: bytes) -> None:
        self._fleet.tell(_put(issued, roots))
        self._received.set()


def _put(issued: Certificate, roots: bytes) -> messages.PutCertificate:
    return messages.PutCertificate(str(issued.identity), issued.chain, issued.key, roots)

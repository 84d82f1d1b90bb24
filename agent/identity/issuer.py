"""What an agent needs of whoever issues certificates. Pure.

The agent asks by identity and gets everything that TLS needs; keys exist in memory only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from agent.model.identity import SpiffeId


@dataclass(frozen=True, slots=True)
class Certificate:
    """One identity's certificate; PEM texts, seconds since the epoch. The key is not in `repr`."""

    identity: SpiffeId
    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes
    not_before: float
    expires: float


class Issuer(Protocol):
    """Issues certificates for the pods of this node."""

    async def issue(self, identity: SpiffeId) -> Certificate:
        """Return a fresh certificate (IdentityError if none can be had)."""
        ...

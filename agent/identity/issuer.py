"""What an agent needs of whoever issues certificates. Pure.

The agent asks by identity and gets everything that TLS needs; keys exist in memory only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datetime import datetime

    from agent.model.identity import SpiffeId


@dataclass(frozen=True, slots=True)
class Certificate:
    """One identity's certificate; PEM texts. The key is left out of `repr`."""

    identity: SpiffeId
    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes
    expires: datetime


class Issuer(Protocol):
    """Issues certificates for the pods of this node."""

    def issue(self, identity: SpiffeId) -> Certificate:
        """Return a fresh certificate (NoCertificate if none can be had)."""
        ...

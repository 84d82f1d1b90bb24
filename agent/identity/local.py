"""The CA's signing core in one process, for benchmarks and tests that measure something else.

It checks no caller: who can read the directory can have any identity. The lab and the agents do
not use it; they ask `sidestep ca`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from agent.identity import custody, der, keys
from agent.identity.issuer import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    from agent.identity.authority import Authority
    from agent.model.identity import SpiffeId

LIFETIME = timedelta(hours=24)


class LocalAuthority:
    """The signing core of the CA, on the key in a directory."""

    def __init__(self, core: Authority) -> None:
        self.core = core

    @classmethod
    def create(cls, directory: Path, trust_domain: str) -> LocalAuthority:
        """Make a new root in `directory`, or open the one that is there."""
        return cls(custody.open_authority(custody.DirectoryStore(directory), trust_domain))

    def issue(self, identity: SpiffeId, lifetime: timedelta = LIFETIME) -> Certificate:
        """Make a key and sign a certificate."""
        key = keys.generate()
        csr = keys.build_csr(key, identity).decode()
        *chain, roots = self.core.sign_request(csr, identity, lifetime)
        text = "".join(chain).encode()
        facts = der.read_certificate(der.decode_pem(text)[0])
        return Certificate(
            identity, text, keys.build_pem(key), roots.encode(), facts.not_before, facts.not_after
        )

"""The agent's side of CreateCertificate: one call, one certificate.

The key is made here and stays in memory. The token and the roots are read from their files for
every call, since both are replaced while the agent runs. What comes back is checked before it is
used: our key, the identity that was asked for, a chain that ends at a trusted root, and a validity
that has begun and not ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cryptography import x509

from agent.errors import AuthorityRefused, AuthorityUnavailable, ClocksDiffer, NoAuthority
from agent.identity import keys, wire
from agent.identity.authority import PARSE_ERRORS, is_chain, load_certificates
from agent.identity.caller import Target
from agent.identity.calls import Calls
from agent.identity.issuer import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    from agent.model.identity import SpiffeId

# Status names of gRPC: asking again with the same token and request is no use.
REFUSALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_ARGUMENT"})


class AuthorityClient:
    """Implements Issuer over gRPC."""

    def __init__(
        self, address: str, server_name: str, token: Path, roots: Path, lifetime_seconds: int
    ) -> None:
        """Name the CA; `server_name` must be in its certificate, empty for the address's host."""
        self._address = address
        self._server_name = server_name
        self._token = token
        self._roots = roots
        self._lifetime_seconds = lifetime_seconds
        self._calls = Calls()

    async def issue(self, identity: SpiffeId) -> Certificate:
        """Make a key and have it certified.

        Raises:
            AuthorityUnavailable: the CA did not answer, or a file that is needed is not there.
            AuthorityRefused: it refused, or what it signed is not what was asked for.
            ClocksDiffer: what it signed is not valid now.
        """
        key = keys.generate()
        request = wire.Request(
            keys.build_csr(key, identity).decode(), self._lifetime_seconds, str(identity)
        )
        try:
            token = self._token.read_text().strip()
            target = Target(self._address, self._server_name, self._roots.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise AuthorityUnavailable(f"the CA cannot be asked: {error}") from error
        status, answer = await self._calls.call(target, token, wire.build_request(request))
        if isinstance(answer, str):
            kind = AuthorityRefused if status in REFUSALS else AuthorityUnavailable
            raise kind(f"the CA at {self._address} says {status}: {answer}")
        return self._check(identity, key, answer)

    def _check(self, identity: SpiffeId, key: keys.PrivateKey, answer: bytes) -> Certificate:
        try:
            texts = wire.parse_response(answer)
            chain = load_certificates("".join(texts[:-1]).encode(), "the CA's answer")
            roots = load_certificates("".join(texts[-1:]).encode(), "the CA's answer")
            names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            key_of_chain = chain[0].public_key()
        except (
            ValueError,
            IndexError,
            NoAuthority,
            x509.ExtensionNotFound,
            *PARSE_ERRORS,
        ) as error:
            raise AuthorityRefused(f"the CA's answer is no certificate chain: {error}") from error
        if list(names) != [x509.UniformResourceIdentifier(str(identity))]:
            raise AuthorityRefused(f"the CA signed another identity than {identity}")
        if key_of_chain != key.public_key():
            raise AuthorityRefused("the CA signed another key than ours")
        if not is_chain(chain, roots):
            raise AuthorityRefused("the CA's chain does not lead to one of the roots that it sent")
        begin, end = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
        if not begin.timestamp() <= time.time() < end.timestamp():
            raise ClocksDiffer(
                f"the CA signed for {begin.isoformat()} to {end.isoformat()}, which is not now: "
                "compare the clock of this node with the CA's"
            )
        return Certificate(
            identity,
            "".join(texts[:-1]).encode(),
            keys.build_pem(key),
            texts[-1].encode(),
            begin.timestamp(),
            end.timestamp(),
        )

    async def close(self) -> None:
        """End the calls in flight; they fail."""
        await self._calls.close()

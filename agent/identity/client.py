"""The agent's side of CreateCertificate: one call, one certificate.

The key is made here and stays in memory. The token and the roots are read from their files for
every call, since both are replaced while the agent runs. What comes back is checked before it is
used: our key, the identity that was asked for, and a chain that ends at a trusted root.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from cryptography import x509

from agent.errors import AuthorityRefused, AuthorityUnavailable, NoAuthority
from agent.identity import keys, wire
from agent.identity.authority import is_chain, load_certificates
from agent.identity.issuer import Certificate

if TYPE_CHECKING:
    from pathlib import Path

    from agent.model.identity import SpiffeId

CALL_SECONDS = 10.0
REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
)


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
        self._trusted = b""
        self._channel: grpc.aio.Channel | None = None

    async def issue(self, identity: SpiffeId) -> Certificate:
        """Make a key and have it certified.

        Raises:
            AuthorityUnavailable: the CA did not answer, or a file that is needed is not there.
            AuthorityRefused: it refused, or what it signed is not what was asked for.
        """
        key = keys.generate()
        request = wire.Request(
            keys.build_csr(key, identity).decode(), self._lifetime_seconds, str(identity)
        )
        try:
            token = self._token.read_text().strip()
            channel = await self._open_channel()
        except (OSError, UnicodeDecodeError) as error:
            raise AuthorityUnavailable(f"the CA cannot be asked: {error}") from error
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(wire.METHOD)
        try:
            answer: bytes = await call(
                wire.build_request(request),
                timeout=CALL_SECONDS,
                metadata=(("authorization", f"Bearer {token}"),),
            )
        except grpc.aio.AioRpcError as error:
            kind = AuthorityRefused if error.code() in REFUSALS else AuthorityUnavailable
            detail = f"{error.code().name}: {error.details()}"
            raise kind(f"the CA at {self._address} says {detail}") from error
        except asyncio.CancelledError:
            # gRPC cancels calls of a channel that was closed under them; our own passes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise AuthorityUnavailable("the roots changed during the call") from None
        return self._check(identity, key, answer)

    async def _open_channel(self) -> grpc.aio.Channel:
        trusted = self._roots.read_bytes()
        if self._channel is None or trusted != self._trusted:
            await self.close()
            self._trusted = trusted
            options: list[tuple[str, str | int]] = [
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # How often is asked again is decided above; gRPC must not wait longer than that.
                ("grpc.max_reconnect_backoff_ms", 1_000),
            ]
            if self._server_name:
                options.append(("grpc.ssl_target_name_override", self._server_name))
            credentials = grpc.ssl_channel_credentials(trusted)
            self._channel = grpc.aio.secure_channel(self._address, credentials, options)
        return self._channel

    def _check(self, identity: SpiffeId, key: keys.PrivateKey, answer: bytes) -> Certificate:
        try:
            texts = wire.parse_response(answer)
            chain = load_certificates("".join(texts[:-1]).encode(), "the CA's answer")
            roots = load_certificates("".join(texts[-1:]).encode(), "the CA's answer")
            names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, IndexError, NoAuthority, x509.ExtensionNotFound) as error:
            raise AuthorityRefused(f"the CA's answer is no certificate chain: {error}") from error
        if list(names) != [x509.UniformResourceIdentifier(str(identity))]:
            raise AuthorityRefused(f"the CA signed another identity than {identity}")
        if chain[0].public_key() != key.public_key():
            raise AuthorityRefused("the CA signed another key than ours")
        if not is_chain(chain, roots):
            raise AuthorityRefused("the CA's chain does not lead to one of the roots that it sent")
        return Certificate(
            identity,
            "".join(texts[:-1]).encode(),
            keys.build_pem(key),
            texts[-1].encode(),
            chain[0].not_valid_before_utc.timestamp(),
            chain[0].not_valid_after_utc.timestamp(),
        )

    async def close(self) -> None:
        """Close the connection to the CA; calls in flight fail."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

"""The CA on the network: istio.v1.auth.IstioCertificateService over gRPC and TLS.

    bearer token -> caller and node -> does a pod with that identity run there? -> sign

Any other case is refused with a code and a reason for the caller, and one audit line here. Keys of
pods never come here: a request carries a public key only.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import grpc
import grpc.aio

from agent.errors import CallerUnknown, IdentityDenied, IdentityError, RequestInvalid
from agent.identity import der, keys, wire
from agent.model.identity import parse_spiffe_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv6Address

    from agent.identity.authority import Authority
    from agent.model.caller import Caller
    from agent.model.identity import SpiffeId

log = logging.getLogger(__name__)
MAX_REQUEST_BYTES = 64 * 1024
MAX_CALLS = 256
SHORTEST_SECONDS = 5
SERVER_LIFETIME = timedelta(hours=24)
CODES: dict[type[IdentityError], grpc.StatusCode] = {
    CallerUnknown: grpc.StatusCode.UNAUTHENTICATED,
    RequestInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    IdentityDenied: grpc.StatusCode.PERMISSION_DENIED,
}
Context = grpc.aio.ServicerContext[bytes, bytes]


class Authenticator(Protocol):
    """Knows the agents by their tokens."""

    async def identify(self, token: str) -> Caller:
        """Return whose token it is (CallerUnknown)."""
        ...


class Placement(Protocol):
    """Knows which pods run where."""

    async def runs_on(self, node: str, identity: SpiffeId) -> bool:
        """Whether a pod with that identity is scheduled on the node."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What the CA signs at all."""

    trust_domain: str
    longest: timedelta = timedelta(hours=24)


@dataclass
class Counters:
    """What the CA has done since it started; refusals by reason."""

    signed: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class CertificateService:
    """Answers CreateCertificate. `authority` may be replaced while it runs."""

    def __init__(
        self,
        authority: Authority,
        authenticator: Authenticator,
        placement: Placement,
        terms: Terms,
    ) -> None:
        self.authority = authority
        self.counters = Counters()
        self._authenticator = authenticator
        self._placement = placement
        self._terms = terms

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what a gRPC server is to be given."""
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(
            self.create_certificate
        )
        return grpc.method_handlers_generic_handler(wire.SERVICE, {"CreateCertificate": handler})

    async def create_certificate(self, message: bytes, context: Context) -> bytes:
        """Serve one call."""
        fields: dict[str, object] = {"peer": context.peer()}
        try:
            chain = await self._create(message, context, fields)
        except IdentityError as error:
            refused = self.counters.refused
            refused[error.reason] = refused.get(error.reason, 0) + 1
            detail = {"reason": error.reason, "detail": str(error)}
            log.warning("certificate refused", extra=fields | detail)
            code = CODES.get(type(error), grpc.StatusCode.INTERNAL)
            await context.abort(code, f"{error.reason}: {error}")
        self.counters.signed += 1
        log.info("certificate signed", extra=fields)
        return wire.build_response(chain)

    async def _create(
        self, message: bytes, context: Context, fields: dict[str, object]
    ) -> list[str]:
        caller = await self._authenticator.identify(_bearer(context))
        fields |= {"caller": caller.name, "node": caller.node}
        try:
            request = wire.parse_request(message)
        except ValueError as error:
            raise RequestInvalid(str(error)) from error
        fields["identity"] = request.impersonated
        if not request.impersonated:
            raise RequestInvalid(f"the request names no identity in {wire.IMPERSONATED}")
        try:
            identity = parse_spiffe_id(request.impersonated)
        except ValueError as error:
            raise RequestInvalid(str(error)) from error
        if identity.trust_domain != self._terms.trust_domain:
            raise IdentityDenied(f"this CA signs for trust domain {self._terms.trust_domain} only")
        if not await self._placement.runs_on(caller.node, identity):
            raise IdentityDenied(f"no pod with {identity} is scheduled on node {caller.node}")
        lifetime = self._terms.longest
        if request.validity_seconds > 0:
            asked = timedelta(seconds=min(request.validity_seconds, lifetime.total_seconds()))
            lifetime = max(asked, timedelta(seconds=SHORTEST_SECONDS))
        chain = self.authority.sign_request(request.csr, identity, lifetime)
        facts = der.read_certificate(der.decode_pem(chain[0].encode())[0])
        fields |= {"serial": f"{facts.serial:x}", "expires": int(facts.not_after)}
        return chain


def _bearer(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            scheme, _, token = (value if isinstance(value, str) else "").partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                return token.strip()
    raise CallerUnknown("the call carries no bearer token")


class ServerCredentials:
    """The CA's own TLS certificate: signed by itself, renewed at half of its life."""

    def __init__(
        self,
        service: CertificateService,
        hosts: Sequence[str],
        addresses: Sequence[IPv4Address | IPv6Address],
    ) -> None:
        self._service = service
        self._hosts = hosts
        self._addresses = addresses
        self._signed_by: Authority | None = None
        self._signed_at = self._renew_at = 0.0

    def build(self) -> grpc.ServerCredentials:
        """Return what a gRPC port is to be given; it asks `fetch` at each handshake."""
        first = self.fetch()
        assert first is not None
        return grpc.dynamic_ssl_server_credentials(
            first,
            self.fetch,  # type: ignore[arg-type]  # None is "as before", gRPC L22 has it
        )

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new certificate if one is due, else None."""
        authority = self._service.authority
        now = time.time()
        # Before it was signed: the clock was set back, and it may not be valid yet.
        if authority is self._signed_by and self._signed_at <= now < self._renew_at:
            return None
        key = keys.generate()
        chain = authority.sign_server(key, self._hosts, self._addresses, SERVER_LIFETIME)
        self._signed_by = authority
        self._signed_at, self._renew_at = now, now + SERVER_LIFETIME.total_seconds() / 2
        return grpc.ssl_server_certificate_configuration([(keys.build_pem(key), chain)])


async def start_server(
    service: CertificateService, credentials: ServerCredentials, address: str
) -> grpc.aio.Server:
    """Listen on ADDRESS:PORT or unix:PATH (RuntimeError if that is not possible)."""
    server = grpc.aio.server(
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((service.handlers(),))
    server.add_secure_port(address, credentials.build())
    await server.start()
    return server

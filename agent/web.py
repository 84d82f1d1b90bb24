"""A very small HTTP/1.1 server: GET and POST, one request for each connection, no body.

For metrics and the admin pages, on loopback or on the agent's unix socket; only metrics may be
served to other machines, where the operator says so. On loopback a request that names another host
is refused: it comes from a browser that a stranger's page has sent here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from agent.errors import ConfigError, SidestepError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Query = dict[str, str]
    Handler = Callable[[Query], Awaitable["Response"]]
    Routes = Mapping[tuple[str, str], Handler]  # (method, path)

HOST = "127.0.0.1"
EVERYWHERE, EVERYWHERE4 = "::", "0.0.0.0"
REQUEST_SECONDS = 5.0
REQUEST_BYTES = 8192
END_OF_HEAD = b"\r\n\r\n"
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; text if no other type is said."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = "text/plain; charset=utf-8"


def text(line: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Answer with a line of text."""
    return Response(f"{line}\n".encode(), status)


async def answer(head: bytes, routes: Routes, *, is_public: bool = False) -> bytes:
    """Return what to send for one request, whose head ends with an empty line.

    Where it is not public the request has to name this machine's loopback as its Host.
    """
    try:
        response = await _respond(head, routes, is_public)
    except SidestepError as error:
        response = text(str(error), HTTPStatus.BAD_REQUEST)
    lines = (
        f"HTTP/1.1 {response.status.value} {response.status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + END_OF_HEAD + response.body


async def _respond(head: bytes, routes: Routes, is_public: bool) -> Response:
    lines = head.decode("latin-1").split("\r\n")
    method, separator, rest = lines[0].partition(" ")
    target, separator, version = rest.rpartition(" ")
    if not separator or not version.startswith("HTTP/1."):
        return text("this is no HTTP/1.1 request", HTTPStatus.BAD_REQUEST)
    if not is_public and not _is_for_here(lines[1:]):
        return text("the Host of the request is not this machine", HTTPStatus.MISDIRECTED_REQUEST)
    try:
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=16))
    except ValueError:
        return text("the address cannot be read", HTTPStatus.BAD_REQUEST)
    handler = routes.get((method, parts.path))
    if handler is not None:
        return await handler(query)
    known = sorted({path for _method, path in routes})
    if parts.path in known:
        return text(f"{method} is not for {parts.path}", HTTPStatus.METHOD_NOT_ALLOWED)
    return text(f"there are {', '.join(known)}", HTTPStatus.NOT_FOUND)


def _is_for_here(fields: list[str]) -> bool:
    for field in fields:
        name, _, value = field.partition(":")
        if name.strip().lower() == "host":
            host = value.strip().lower()
            return host in LOOPBACK_NAMES or host.rpartition(":")[0] in LOOPBACK_NAMES
    return True


class Server:
    """Serves routes on a port, of the node's loopback if nothing else is said."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._is_public = False
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None

    def bind(self, port: int, option: str, host: str = HOST, *, is_successor: bool = False) -> None:
        """Take the port; 0 is any free one (ConfigError names `option` if it is taken).

        A successor may take it beside the server that it follows, which is connected to until it
        has stopped. On another address than the loopback requests may name any Host.
        """
        self._is_public = host != HOST
        try:
            self._socket = _bind(host, port, is_successor)
        except OSError as error:
            raise ConfigError(f"{option} {port}: {error.strerror}") from error

    async def start(self) -> None:
        """Serve the port, if one was bound."""
        if self._socket is None:
            return
        # For the next one: it may come while this one runs, or find only what is left of its
        # connections. Not before, since either lets others have the port as well.
        for option in (socket.SO_REUSEPORT, socket.SO_REUSEADDR):
            self._socket.setsockopt(socket.SOL_SOCKET, option, 1)
        self._server = await asyncio.start_server(
            self._serve, sock=self._socket, limit=REQUEST_BYTES
        )

    @property
    def port(self) -> int | None:
        """The port that was bound; None before `bind`."""
        return self._socket.getsockname()[1] if self._socket else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(END_OF_HEAD)
            writer.write(await answer(head, self._routes, is_public=self._is_public))
            async with asyncio.timeout(REQUEST_SECONDS):
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or asked for nothing
        finally:
            writer.close()

    def stop(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()


def _bind(host: str, port: int, is_successor: bool) -> socket.socket:
    if host == EVERYWHERE and not socket.has_dualstack_ipv6():
        host = EVERYWHERE4
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # SO_REUSEPORT binds beside those who have it as well, and are root as well. A first one
        # does without, or it would share the port of an agent that it knows nothing of.
        option = socket.SO_REUSEPORT if is_successor else socket.SO_REUSEADDR
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        if host == EVERYWHERE:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound

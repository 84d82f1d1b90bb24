"""Serve the CNI plugin at a unix socket: a request, an answer, the end.

What is asked and answered says `cni.protocol`; what is done for it, `agent.arrivals`. Below the
run directory, mode 0600: the runtime is root. Whatever goes wrong becomes an error of the CNI
specification, so that the runtime tries again and the pod's events say why.

Called by the composition root.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from cni.protocol import SUCCESS, CniError, Code, Request, build_error, parse_request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from agent.tunnel.counts import Counted

log = logging.getLogger(__name__)
REQUEST_BYTES = 2 << 20
REQUEST_SECONDS = 10.0
BACKLOG = 512  # a node that starts has all its pods made at once


class Plugin(Protocol):
    """Who knows what to do."""

    async def serve(self, request: Request) -> Callable[[], Awaitable[None]] | None:
        """Do it (CniError); return what is to be done once it was answered."""
        ...


class PluginServer:
    """The agent's end of the CNI plugin."""

    def __init__(self, path: Path, plugin: Plugin, on_counts: Callable[[Counted], None]) -> None:
        self._path = path
        self._plugin = plugin
        self._on_counts = on_counts
        self._server: asyncio.Server | None = None
        self._unanswered: set[asyncio.Task[None]] = set()
        self._settling: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; a socket that a dead agent left is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, backlog=BACKLOG)
        self._path.chmod(0o600)

    def close(self) -> None:
        """Take no request any more; those that are not answered fail, and are tried again."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._path.unlink(missing_ok=True)
        for task in self._unanswered:
            task.cancel()

    async def stop(self) -> None:
        """Close, and wait until nothing is done any more."""
        self.close()
        await asyncio.gather(*self._unanswered, *self._settling, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._unanswered.add(task)
        settle = None
        try:
            with suppress(ConnectionError):
                answer, settle = await self._answer(reader)
                writer.write(answer)
                await writer.drain()
        except asyncio.CancelledError:
            # The agent stops. The plugin finds the connection closed, and fails.
            return
        finally:
            writer.close()
            self._unanswered.discard(task)
        if settle is not None:
            self._settling.add(task)
            try:
                await settle()
            finally:
                self._settling.discard(task)

    async def _answer(
        self, reader: asyncio.StreamReader
    ) -> tuple[bytes, Callable[[], Awaitable[None]] | None]:
        request = Request("")
        try:
            request = parse_request(await _read(reader))
            settle = await self._plugin.serve(request)
        except CniError as error:
            self._count(request.command, str(int(error.code)))
            log.warning("cni request failed", extra=_named(request) | {"error": str(error)})
            return build_error(error, request.cni_version), None
        except Exception:
            self._count(request.command, str(int(Code.TRY_AGAIN_LATER)))
            log.exception("cni request failed by a defect", extra=_named(request))
            defect = CniError(
                Code.TRY_AGAIN_LATER, "the agent failed; its log has the traceback to report"
            )
            return build_error(defect, request.cni_version), None
        self._count(request.command, "0")
        return SUCCESS, settle

    def _count(self, command: str, code: str) -> None:
        labels = (("code", code), ("command", command or "?"))
        self._on_counts((("cni_requests", labels, 1),))


async def _read(reader: asyncio.StreamReader) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            while part := await reader.read(REQUEST_BYTES):
                data += part
                if len(data) > REQUEST_BYTES:
                    raise CniError(Code.DECODE_FAILURE, "the request is larger than 2 MiB")
    except TimeoutError as error:
        raise CniError(Code.DECODE_FAILURE, "the request has no end") from error
    return bytes(data)


def _named(request: Request) -> dict[str, str]:
    return {
        "command": request.command,
        "pod": f"{request.namespace}/{request.name}",
        "container": request.container_id,
    }

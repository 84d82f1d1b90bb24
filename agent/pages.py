"""The admin pages: health, configuration, log levels, profile. Only for this machine's loopback.

    GET  /healthz/ready       200, or 503 and what is pending, each with its reason
    GET  /healthz/live        200 while the control process answers
    GET  /config_dump         as ztunnel's, for istioctl
    POST /logging?level=...   LEVEL or SCOPE=LEVEL[,...]; without one, or by GET, says how it is
    GET  /debug/pprof/profile?seconds=10&frequency=100

Paths and parameters are ztunnel's. Nothing here ends the agent, or shows a key.
"""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from agent import web
from agent.errors import RequestRefused
from agent.loglines import ACCESS, TUNNEL, parse_levels
from agent.pprof import build_profile
from agent.sampling import Sampler
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.fleet import Fleet
    from agent.model.stacks import Stacks

LONGEST_PROFILE_SECONDS = 300
HIGHEST_FREQUENCY = 1000
OWN_SCOPES = (ACCESS, TUNNEL, "agent")  # and those below; the rest are libraries
GRACE_SECONDS = 3.0  # for workers to send what they found


class Pages:
    """What the admin port and the agent's socket serve."""

    def __init__(
        self,
        pending: Callable[[], dict[str, str]],
        config: Callable[[], Awaitable[object]],
        levels: Callable[[], str],
        set_levels: Callable[[str], None],
        fleet: Fleet,
    ) -> None:
        """Serve nothing yet.

        `pending()` names what the agent still waits for, and why; `set_levels(text)` raises
        ConfigError.
        """
        self._pending = pending
        self._config = config
        self._levels = levels
        self._set_levels = set_levels
        self._fleet = fleet
        self._profiling = asyncio.Lock()

    def routes(self) -> web.Routes:
        """Return the pages by method and path."""
        return {
            ("GET", "/"): self._index,
            ("GET", "/healthz/ready"): self._ready,
            ("GET", "/healthz/live"): self._live,
            ("GET", "/config_dump"): self._dump,
            ("GET", "/logging"): self._logging,
            ("POST", "/logging"): self._logging,
            ("GET", "/debug/pprof/profile"): self._profile,
        }

    async def _index(self, _query: web.Query) -> web.Response:
        return web.text("\n".join(f"{method:5}{path}" for method, path in self.routes()))

    async def _ready(self, _query: web.Query) -> web.Response:
        pending = self._pending()
        if not pending:
            return web.text("ready")
        named = ", ".join(f"{name} ({why})" for name, why in pending.items())
        return web.text(f"not ready, pending: {named}", HTTPStatus.SERVICE_UNAVAILABLE)

    async def _live(self, _query: web.Query) -> web.Response:
        return web.text("alive")

    async def _dump(self, _query: web.Query) -> web.Response:
        body = json.dumps(await self._config(), indent=2).encode()
        return web.Response(body, content_type="application/json")

    async def _logging(self, query: web.Query) -> web.Response:
        # `SCOPE=LEVEL` is a parameter by itself, as ztunnel has it, or a part of `level`.
        wanted = [
            value if name == "level" else f"{name}={value}"
            for name, value in query.items()
            if value
        ]
        if wanted:
            _refuse_unknown_scopes(",".join(wanted))
            self._set_levels(",".join(wanted))
        return web.text(f"current log level is {self._levels()}")

    async def _profile(self, query: web.Query) -> web.Response:
        seconds = _parameter(query, "seconds", 10, LONGEST_PROFILE_SECONDS)
        frequency = _parameter(query, "frequency", 100, HIGHEST_FREQUENCY)
        if self._profiling.locked():
            return web.text("a profile is being taken already", HTTPStatus.CONFLICT)
        async with self._profiling:
            stacks = await self._sample(seconds, frequency)
        body = build_profile(stacks, seconds, frequency)
        return web.Response(body, content_type="application/octet-stream")

    async def _sample(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        def build(number: int) -> messages.ToWorker:
            return messages.AskProfile(number, seconds, frequency)

        sampler = Sampler(frequency)
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = tasks.create_task(self._fleet.ask(build, seconds + GRACE_SECONDS))
                await asyncio.sleep(seconds)
        finally:
            own = sampler.stop()
        found = {"control": own}
        for pid, answer in asked.result().items():
            if isinstance(answer, messages.Profile):
                found[f"worker {pid}"] = answer.stacks
        return found


def _refuse_unknown_scopes(levels: str) -> None:
    """Raise RequestRefused for a scope that no line has: a slip of the pen would change nothing."""
    # The log has the name of every part of this process that is imported, and of those above it.
    known = {ACCESS, TUNNEL, *logging.root.manager.loggerDict}
    for scope, _level in parse_levels(levels).scopes:
        if scope not in known:
            own = sorted(name for name in known if name.partition(".")[0] in OWN_SCOPES)
            raise RequestRefused(f"nothing logs as {scope!r}; scopes are {', '.join(own)}")


def _parameter(query: web.Query, name: str, usual: int, most: int) -> int:
    text = query.get(name, str(usual))
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= most:
        raise RequestRefused(f"{name} must be a number from 1 to {most}, not {text!r}")
    return int(text)

"""The identities of a node's pods: which are waited for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from agent.credentials import Credentials
from agent.identity.issuer import Certificate
from agent.model.identity import SpiffeId

if TYPE_CHECKING:
    import pytest

WEB, JOB = (SpiffeId("td", "shop", name) for name in ("web", "job"))
SETTINGS: Any = SimpleNamespace(
    authority=SimpleNamespace(
        address="", server_name="", token=Path(), roots=Path(), lifetime_seconds=1
    ),
    revoked=None,
)


def test_nobody_waits_for_the_certificate_of_a_pod_that_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet: Any = SimpleNamespace(tell=lambda *_message: None)
    credentials = Credentials(SETTINGS, fleet, lambda: None)
    received: list[tuple[Certificate, bytes]] = []
    monkeypatch.setattr(credentials.keeper, "certificates", lambda: received)

    async def check() -> None:
        credentials.want({WEB, JOB})
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(credentials.wait_complete({WEB}))
            await asyncio.sleep(0)
            assert not waiting.done()
            issued = Certificate(WEB, b"", b"", b"", 0, 1)
            received.append((issued, b""))
            credentials.keeper.on_certificate(issued, b"")

    asyncio.run(check())

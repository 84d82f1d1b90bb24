"""Limits of a worker as a pod and its peers meet them: what is beyond is refused, the rest goes on."""

from __future__ import annotations

import os
import resource
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.model.bounds import Bounds
from agent.tunnel import messages
from tests.node.conftest import TRUST_DOMAIN, MeshPod, certificate_for, listener_message
from tests.support.namespaces import PEER4

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.datapath import pins
    from tests.node.conftest import MeshPair

pytestmark = pytest.mark.root

Serve = Callable[..., threading.Thread] if TYPE_CHECKING else None
PORT = 8080


def bound(mesh: MeshPair, member: MeshPod, loaded: pins.Pins, **limits: Any) -> None:
    """Have a worker serve its pod with these limits from now on."""
    identity = TRUST_DOMAIN, "default", member.workload.service_account
    member.worker.tell(
        messages.Configure(str(loaded.directory), TRUST_DOMAIN, bounds=Bounds(**limits))
    )
    message, fds = listener_message(member.enrollment)
    messages.send(member.worker.channel, message, fds)
    member.worker.settle()

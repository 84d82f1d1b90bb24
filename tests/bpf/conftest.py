"""The pod of `network`, enrolled as a test wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from agent import enroll
from agent.model.pod import Exclusions, LocalPod
from tests.support.namespaces import PEER4, PEER6, POD4, POD6, Namespace, Network

if TYPE_CHECKING:
    from agent.datapath import pins

__all__ = ["PEER4", "PEER6", "POD4", "POD6", "Namespace", "Network"]

Enroll = Callable[..., Any]


@pytest.fixture
def enrolled(loaded: pins.Pins, network: Network) -> Iterator[Callable[..., enroll.Enrollment]]:
    """Return a function that enrolls the pod, with exclusions as keywords; undone at the end."""
    with ExitStack() as stack:

        def enroll_pod(*, bypasses_inbound: bool = False, **exclusions: Any) -> enroll.Enrollment:
            pod = LocalPod(
                uid="0d7c8a52-0000-4000-8000-000000000001",
                namespace="default",
                name="client",
                service_account="client",
                addresses=(ip_address(POD4), ip_address(POD6)),
                exclusions=Exclusions(**exclusions),
                bypasses_inbound=bypasses_inbound,
            )
            enrollment = enroll.enroll(loaded, pod, network.pod.fd)
            stack.callback(enroll.unenroll, enrollment)
            for listener in enrollment.outbound + enrollment.inbound + enrollment.hbone:
                listener.settimeout(5)
            return enrollment

        yield enroll_pod


@contextmanager
def blocked() -> Iterator[None]:
    """Expect that a connection is refused or reset."""
    with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
        yield

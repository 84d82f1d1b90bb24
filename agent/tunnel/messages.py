"""What the control process tells a worker, and what a worker answers.

One datagram on an AF_UNIX SOCK_SEQPACKET socket is one pickled message; descriptors travel beside
it (SCM_RIGHTS). Both ends are one installation and the socket is a private pair, which makes
pickle right here, as it is for multiprocessing: the model's values pass as they are. State reaches
a worker this way or through the maps, never as a shared object.
"""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.pod import LocalPod
    from agent.model.service import Service
    from agent.model.workload import Workload

MAX_MESSAGE_BYTES = 180_000  # below the default send buffer of a unix socket
MAX_FDS = 16


@dataclass(frozen=True, slots=True)
class Configure:
    """First message: where the maps are, and who we trust."""

    pin_directory: str
    trust_domain: str
    trust_domain_aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AddPod:
    """Serve a pod. Beside it: the netns, then the listeners in the order of `listener_ports`."""

    pod: LocalPod
    netns_cookie: int
    listener_ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RemovePod:
    """Accept nothing more for a pod; open connections go on."""

    uid: str


@dataclass(frozen=True, slots=True)
class PutCertificate:
    """The certificate of an identity, for new tunnels; PEM texts."""

    identity: str
    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes


@dataclass(frozen=True, slots=True)
class RemoveCertificate:
    """No pod of this node has the identity any more."""

    identity: str


@dataclass(frozen=True, slots=True)
class PutRevoked:
    """The fingerprints of all revoked certificates; beside it a memory file that holds them."""


@dataclass(frozen=True, slots=True)
class PutWorkload:
    """A workload is new or changed."""

    workload: Workload


@dataclass(frozen=True, slots=True)
class RemoveWorkload:
    """A workload is gone."""

    uid: str


@dataclass(frozen=True, slots=True)
class PutService:
    """A service is new or changed."""

    service: Service


@dataclass(frozen=True, slots=True)
class RemoveService:
    """A service is gone."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything sent before `Ask` is in force."""

    number: int


@dataclass(frozen=True, slots=True)
class NeedCertificate:
    """A connection of a worker waits for the certificate of an identity."""

    identity: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Asks for Ready with the same number."""

    number: int


ToWorker = (
    Configure
    | AddPod
    | RemovePod
    | PutCertificate
    | RemoveCertificate
    | PutRevoked
    | PutWorkload
    | RemoveWorkload
    | PutService
    | RemoveService
    | Ask
)
FromWorker = Ready | NeedCertificate


def send(
    channel: socket.socket, message: ToWorker | FromWorker, fds: list[int] | None = None
) -> None:
    """Send one message with its descriptors."""
    socket.send_fds(channel, [pickle.dumps(message)], fds or [])


def receive(channel: socket.socket) -> tuple[ToWorker | FromWorker, list[int]] | None:
    """Receive one message and its descriptors, now the caller's; None at the end."""
    data, fds, _flags, _address = socket.recv_fds(channel, MAX_MESSAGE_BYTES, MAX_FDS)
    return (pickle.loads(data), fds) if data else None

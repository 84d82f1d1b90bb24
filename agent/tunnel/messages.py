"""What the control process tells a worker, and what a worker answers.

One datagram on an AF_UNIX SOCK_SEQPACKET socket is one pickled message; descriptors travel beside
it (SCM_RIGHTS). Both ends are one installation and the socket is a private pair, which makes
pickle right here, as it is for multiprocessing: the model's values pass as they are. State reaches
a worker this way or through the maps, never as a shared object.

A message that is too large for one datagram goes as several: a policy may list more addresses than
a socket's buffer holds. The receiver puts them together, without waiting for those that are still
to come: whoever sends may be held up in between. Nobody else writes to the socket.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.errors import OutOfDescriptors
from agent.model.bounds import DEFAULT_BOUNDS, Bounds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agent.model.open_connection import OpenConnection
    from agent.model.pod import LocalPod
    from agent.model.policy import AnyPolicy, PolicyKey
    from agent.model.service import Service, ServiceKind
    from agent.model.stacks import Stacks
    from agent.model.workload import Workload
    from agent.tunnel.counts import Counted

MAX_MESSAGE_BYTES = 180_000  # below the default send buffer of a unix socket
MAX_FDS = 16
FRAGMENT_BYTES = MAX_MESSAGE_BYTES - 1000  # leaves room for the Fragment around them
POLICIES_AT_ONCE = 50  # in one message: enough to make its own cost small


@dataclass(frozen=True, slots=True)
class Configure:
    """First message: where the maps are, who we trust, and how much anybody may take."""

    pin_directory: str
    trust_domain: str
    trust_domain_aliases: tuple[str, ...] = ()
    bounds: Bounds = DEFAULT_BOUNDS


@dataclass(frozen=True, slots=True)
class AddPod:
    """Serve a pod. Beside it: the netns, then the listeners in the order of `listener_ports`."""

    pod: LocalPod
    netns_cookie: int
    listener_ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DrainPod:
    """Serve a pod that is not captured now, and say Drained after its last inbound connection.

    Peers dial 15008 until they have heard that the pod has left.
    """

    uid: str


@dataclass(frozen=True, slots=True)
class Drained:
    """A pod has no inbound connection any more, and the worker serves it no more."""

    uid: str


@dataclass(frozen=True, slots=True)
class RemovePod:
    """Accept nothing more for a pod.

    If it comes back, its tunnels go on, and serve what is asked in them until it is here again.
    """

    uid: str
    comes_back: bool = False


@dataclass(frozen=True, slots=True)
class Retire:
    """Accept nothing more, say goodbye to peers, and end when the last connection has.

    With a successor, streams that peers open before they have heard are served as well.
    """

    has_successor: bool


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
    kind: ServiceKind = "Service"


@dataclass(frozen=True, slots=True)
class PutPolicies:
    """Policies are new or changed, once Enforce comes."""

    policies: tuple[AnyPolicy, ...]


@dataclass(frozen=True, slots=True)
class RemovePolicies:
    """Policies are gone, once Enforce comes."""

    keys: tuple[PolicyKey, ...]


@dataclass(frozen=True, slots=True)
class Enforce:
    """Bring the policies said before into force together, and judge open connections again."""


@dataclass(frozen=True, slots=True)
class SetLogging:
    """How to log from now on; `levels` as `agent.loglines.parse_levels` reads them."""

    form: str
    levels: str
    lines_a_second: int


@dataclass(frozen=True, slots=True)
class ListConnections:
    """Asks for Connections: those opened after `after`, a number that Connections gave or 0."""

    number: int
    after: int = 0
    namespace: str | None = None
    pod: str | None = None


@dataclass(frozen=True, slots=True)
class Connections:
    """Open connections, and where to go on; `last` is 0 if these were all."""

    number: int
    found: tuple[OpenConnection, ...]
    last: int


@dataclass(frozen=True, slots=True)
class AskGauges:
    """Asks for Gauges with the same number."""

    number: int


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a worker has now, as metrics: name, labels, value."""

    number: int
    counts: Counted


@dataclass(frozen=True, slots=True)
class AskProfile:
    """Asks for Profile when so many seconds have passed."""

    number: int
    seconds: float
    frequency: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Where a worker spent processor time: how often each stack was seen."""

    number: int
    stacks: Stacks


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a message, in order; `is_last` ends it."""

    data: bytes
    is_last: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """Everything sent before `Ask` is in force."""

    number: int


@dataclass(frozen=True, slots=True)
class NeedCertificate:
    """A connection of a worker waits for the certificate of an identity."""

    identity: str


@dataclass(frozen=True, slots=True)
class PutCounts:
    """What a worker has counted since it told last."""

    counts: Counted


@dataclass(frozen=True, slots=True)
class Ask:
    """Asks for Ready with the same number."""

    number: int


ToWorker = (
    Configure
    | AddPod
    | DrainPod
    | RemovePod
    | Retire
    | PutCertificate
    | RemoveCertificate
    | PutRevoked
    | PutWorkload
    | RemoveWorkload
    | PutService
    | RemoveService
    | PutPolicies
    | RemovePolicies
    | Enforce
    | Ask
    | SetLogging
    | ListConnections
    | AskGauges
    | AskProfile
)
Answer = Ready | Connections | Gauges | Profile
FromWorker = NeedCertificate | Drained | PutCounts | Answer


class Outbox:
    """What goes to a message socket, in order.

    Where the socket does not wait, what finds no room is kept. The owner has it flushed when there
    is room again, and sees to it that it does not become more and more.
    """

    def __init__(self, channel: socket.socket) -> None:
        """Write to a socket that stays the caller's."""
        self._channel = channel
        # Not as bytes: the state has most of what is in them, and here are 100,000 at times.
        self._unsent: deque[tuple[ToWorker | FromWorker, list[int]]] = deque()
        self._datagrams: deque[bytes] = deque()  # of the message whose turn it is
        self._is_begun = False  # its descriptors went with the first of them

    def __len__(self) -> int:
        """Count the messages that are kept."""
        return len(self._unsent)

    def __contains__(self, message: ToWorker | FromWorker) -> bool:
        """Whether such a message is kept."""
        return any(unsent == message for unsent, _fds in self._unsent)

    def put(self, message: ToWorker | FromWorker, fds: Sequence[int] = ()) -> None:
        """Send a message with its descriptors, or keep it; they stay the caller's.

        Raises:
            OSError: it is lost.
        """
        if not self._unsent:
            self._begin(message)
            if self._go_on(fds):
                return
        self._unsent.append((message, _duplicate(fds)))

    def flush(self) -> None:
        """Send what is kept, as far as there is room.

        Raises:
            OSError: all of it is lost.
        """
        while self._unsent:
            message, fds = self._unsent[0]
            if not self._datagrams:
                self._begin(message)
            try:
                if not self._go_on(fds):
                    return
            except OSError:
                self.clear()
                raise
            self._drop_first()

    def clear(self) -> None:
        """Forget what is kept."""
        self._datagrams.clear()
        while self._unsent:
            self._drop_first()

    def _begin(self, message: ToWorker | FromWorker) -> None:
        self._datagrams = deque(_datagrams(pickle.dumps(message)))
        self._is_begun = False

    def _go_on(self, fds: Sequence[int]) -> bool:
        """Send what there is room for of one message, and return whether that was all."""
        while self._datagrams:
            beside = [] if self._is_begun else list(fds)
            try:
                socket.send_fds(self._channel, [self._datagrams[0]], beside)
            except BlockingIOError:
                return False
            self._is_begun = True
            self._datagrams.popleft()
        return True

    def _drop_first(self) -> None:
        _message, fds = self._unsent.popleft()
        for fd in fds:
            os.close(fd)


def _duplicate(fds: Sequence[int]) -> list[int]:
    with ExitStack() as undo:
        own = []
        for fd in fds:
            own.append(os.dup(fd))
            undo.callback(os.close, own[-1])
        undo.pop_all()
    return own


def _datagrams(data: bytes) -> Iterator[bytes]:
    if len(data) <= MAX_MESSAGE_BYTES:
        yield data
        return
    for offset in range(0, len(data), FRAGMENT_BYTES):
        end = offset + FRAGMENT_BYTES
        yield pickle.dumps(Fragment(data[offset:end], is_last=end >= len(data)))


class Inbox:
    """What comes on a message socket."""

    def __init__(self, channel: socket.socket) -> None:
        """Read from a socket that stays the caller's."""
        self._channel = channel
        self._parts: list[bytes] = []  # of a message that is not complete yet
        self._fds: list[int] = []

    def receive(self) -> tuple[ToWorker | FromWorker, list[int]] | None:
        """Receive one datagram; return the message that it completes, None if it is a part of one.

        The descriptors beside a message are the caller's.

        Raises:
            ConnectionError: the other side has ended.
            OutOfDescriptors: some did not fit into the process, and nobody can tell which.
        """
        data, fds, flags, _address = socket.recv_fds(self._channel, MAX_MESSAGE_BYTES, MAX_FDS)
        if not data:
            raise ConnectionResetError("the other side has ended")
        if flags & socket.MSG_CTRUNC:
            raise OutOfDescriptors("descriptors of a message are lost: this process has too many")
        self._fds += fds
        message = pickle.loads(data)
        if isinstance(message, Fragment):
            self._parts.append(message.data)
            if not message.is_last:
                return None
            parts, self._parts = self._parts, []
            message = pickle.loads(b"".join(parts))
        all_fds, self._fds = self._fds, []
        return message, all_fds

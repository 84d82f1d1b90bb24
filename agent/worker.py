"""A worker process: the data plane of some or all connections of the node.

Started by the control process as `python -m agent.worker FD`, where FD is its end of a message
socket. Owns TLS, tunnels and relaying, in one thread around one epoll. Knows what messages told
it, and reads the flow map. Several workers may serve the same listeners. It ends when the control
process closes the socket.

Imports neither kubernetes nor grpc nor bcc nor cryptography.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent.datapath.direct import Verdicts
from agent.datapath.exemption import exempt
from agent.datapath.maps import Map
from agent.datapath.origins import OriginFlows
from agent.descriptors import raise_limit
from agent.errors import SidestepError
from agent.heap import keep_large_blocks
from agent.identity.verify import FINGERPRINT_BYTES
from agent.line_log import LOG, log
from agent.log_sink import never_stall
from agent.loglines import TUNNEL, Format, parse_levels
from agent.model.bounds import DEFAULT_BOUNDS
from agent.model.capture import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT
from agent.model.identity import SpiffeId
from agent.sampling import Sampler
from agent.secrecy import keep_memory_private
from agent.tunnel import messages, sockets
from agent.tunnel.access import Ledger
from agent.tunnel.buffers import BUFFERS, FULL
from agent.tunnel.contexts import Contexts
from agent.tunnel.counts import COUNTS
from agent.tunnel.gate import Gate
from agent.tunnel.inbound import Inbound
from agent.tunnel.listening import Listening
from agent.tunnel.mesh import Mesh
from agent.tunnel.outbound import Outbound
from agent.tunnel.pool import Pool
from agent.tunnel.reactor import READ, WRITE, Reactor
from agent.tunnel.served import ServedPod
from agent.tunnel.session import Session
from agent.tunnel.sockets import PodSockets
from agent.tunnel.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from agent.model.pod import Address
    from agent.tunnel.counts import Labels
    from agent.tunnel.reactor import Timer

    Serve = Callable[[ServedPod, socket.socket, tuple[str, int]], None]

CONNECTIONS_AT_ONCE = 100  # in one answer, which has to fit into one datagram
COUNT_SECONDS = 1.0  # between two messages with counts
MOST_UNSENT = 100  # messages of ours, until we read no more questions
RETIRE_TURN_SECONDS = 0.1  # between two looks at what is left
DRAIN_SECONDS = 2.0  # until the last peer has heard that a pod left the mesh
MANY_CHANGES = 1000  # of policies, at once
OOM_SCORE = Path("/proc/self/oom_score_adj")  # proc(5); a thousandth of the memory that is limited
OOM_HANDICAP, OOM_MOST = 200, 1000


class Neighbors:
    """The pods that this node serves, as outbound.DirectPath: they may be joined by the kernel."""

    def __init__(self, verdicts: Verdicts, served: Mapping[str, ServedPod]) -> None:
        self._verdicts = verdicts
        self._served = served

    def candidate(
        self, source: ServedPod, destination_uid: str, address: Address, port: int
    ) -> Callable[[], None] | None:
        destination = self._served.get(destination_uid)
        if destination is None or destination is source:
            return None
        if not (source.pod.may_go_direct and destination.pod.may_go_direct):
            return None
        generation = self._verdicts.generation
        return lambda: self._verdicts.allow(
            source.netns_cookie,
            destination.netns_cookie,
            port,
            generation,
            is_v6=address.version == 6,
        )


class Worker:
    """Wires the parts when Configure comes, then follows messages."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channel_events = READ
        self._inbox = messages.Inbox(channel)
        self._outbox = messages.Outbox(channel)
        self._reactor = Reactor()
        self._contexts = Contexts(
            self._reactor,
            self._ask_for,
        )
        self._mesh = Mesh()
        self._ledger = Ledger(self._reactor, self._mesh)
        self._gate = Gate(self._mesh)
        self._gate.on_ended = self._end_drain
        self._served: dict[str, ServedPod] = {}
        self._returning: dict[str, ServedPod] = {}  # without listeners, until they are back
        self._departures: dict[str, Timer] = {}  # of pods that drain
        self._trust_domain = ""
        self._serve_by_port: dict[int, Serve] = {}
        self._pool: Pool | None = None
        self._sockets: PodSockets | None = None
        self._bounds = DEFAULT_BOUNDS
        self._trust: Trust | None = None
        self._inbound: Inbound | None = None
        self._sampler: Sampler | None = None

    def run(self) -> None:
        """Serve until the control process goes away.

        No byte waits for that process: what it has not room for is kept.
        """

        def on_first() -> None:
            self._reactor.call_later(COUNT_SECONDS, self._tell_counts)

        COUNTS.on_first = on_first
        BUFFERS.call_later = self._reactor.call_later
        BUFFERS.on_full = self._log_full
        BUFFERS.on_relieved = self._log_relieved
        self._channel.setblocking(False)
        self._reactor.watch(self._channel.fileno(), READ, self._on_channel)
        self._reactor.run()
        self._tell_the_rest()

    def _log_full(self, pod: str) -> None:
        if self._ledger.may_log("warning", TUNNEL):
            log(FULL, level="warning", pod=pod)

    def _log_relieved(self, pod: str, count: int) -> None:
        log("connections reset to make room in the buffers", level="error", pod=pod, count=count)

    def _on_channel(self, ready: int) -> None:
        if ready & WRITE:
            with suppress(OSError):  # as in `_answer`
                self._outbox.flush()
            self._watch_channel()
        if ready & ~WRITE:
            self._on_message()

    def _on_message(self) -> None:
        try:
            received = self._inbox.receive()
        except ConnectionError:  # the control process is gone
            self._reactor.stop()
            return
        if received is None:
            return
        message, fds = received
        match message:
            case messages.Configure():
                self._configure(message)
            case messages.AddPod():
                self._add_pod(message, fds)
            case messages.DrainPod():
                self._drain_pod(message.uid)
            case messages.RemovePod():
                self._remove_pod(message.uid, comes_back=message.comes_back)
            case messages.Retire():
                self._retire(message.has_successor)
            case messages.PutCertificate():
                self._contexts.put(message)
                if self._pool is not None:
                    self._pool.renew(message.identity)
            case messages.RemoveCertificate():
                self._contexts.remove(message.identity)
            case messages.PutRevoked():
                self._put_revoked(fds[0])
            case messages.PutWorkload():
                self._mesh.put_workload(message.workload)
            case messages.RemoveWorkload():
                self._mesh.remove_workload(message.uid)
            case messages.PutService():
                self._mesh.put_service(message.service)
            case messages.RemoveService():
                self._mesh.remove_service(message.namespace, message.name, message.kind)
            case messages.PutPolicies():
                # Cyclic garbage is not looked for while very many values come and none go.
                gc.disable()
                self._gate.put(message.policies)
            case messages.RemovePolicies():
                self._gate.remove(message.keys)
            case messages.Enforce():
                self._enforce()
            case messages.Ask():
                self._answer(messages.Ready(message.number))
            case messages.SetLogging():
                LOG.form, LOG.levels = Format(message.form), parse_levels(message.levels)
                self._ledger.set_limit(message.lines_a_second)
            case messages.ListConnections():
                self._list_connections(message)
            case messages.AskGauges():
                self._answer(messages.Gauges(message.number, tuple(self._gauges())))
            case messages.AskProfile():
                self._profile(message)

    def _configure(self, message: messages.Configure) -> None:
        maps = Path(message.pin_directory) / "maps"
        self._trust_domain = message.trust_domain
        self._bounds = bounds = message.bounds
        BUFFERS.set_limit(bounds.process_buffer_bytes)
        self._sockets = pod_sockets = PodSockets(
            partial(exempt, Map(maps / "ss_exempt")), raise_limit() - bounds.spare_descriptors
        )
        self._trust = Trust(self._reactor, message.trust_domain, message.trust_domain_aliases)
        self._pool = Pool(
            self._reactor, pod_sockets, self._trust, self._contexts, self._ledger.may_log, bounds
        )
        outbound = Outbound(
            self._reactor,
            pod_sockets,
            OriginFlows(Map(maps / "ss_origin_flow")),
            self._mesh,
            self._pool,
            self._contexts,
            Neighbors(
                Verdicts(Map(maps / "ss_verdicts"), Map(maps / "ss_generation")), self._served
            ),
            self._ledger,
            bounds,
        )
        self._inbound = inbound = Inbound(
            self._reactor,
            pod_sockets,
            self._trust,
            self._contexts,
            self._gate,
            self._ledger,
            bounds,
        )
        self._serve_by_port = {
            OUTBOUND_PORT: outbound.serve,
            INBOUND_PORT: inbound.serve_plaintext,
            HBONE_PORT: inbound.serve_tunnel,
        }

    def _ask_for(self, identity: str) -> None:
        message = messages.NeedCertificate(identity)
        if message not in self._outbox:  # it is asked for every ten seconds, and once is enough
            self._answer(message)

    def _answer(self, message: messages.FromWorker) -> None:
        with suppress(OSError):  # the control process is gone: the channel's end says so as well
            self._outbox.put(message)
        self._watch_channel()

    def _watch_channel(self) -> None:
        # Counts and wanted certificates are kept once. All else follows from a message: with many
        # kept, no more are read, so they are bounded as well. Nobody waits for us to read them.
        events = READ if len(self._outbox) < MOST_UNSENT else 0
        if self._outbox:
            events |= WRITE
        if events != self._channel_events:
            self._reactor.change(self._channel.fileno(), events)
            self._channel_events = events

    def _tell_counts(self) -> None:
        if self._outbox:  # they are summed up until there is room: a sum does not grow
            self._reactor.call_later(COUNT_SECONDS, self._tell_counts)
            return
        self._answer(messages.PutCounts(COUNTS.take()))

    def _tell_the_rest(self) -> None:
        """Send what is kept, and the counts of the connections that have ended just now."""
        self._channel.setblocking(True)  # there is nobody left whose bytes would have to wait
        with suppress(OSError):
            self._outbox.put(messages.PutCounts(COUNTS.take()))
            self._outbox.flush()

    def _list_connections(self, asked: messages.ListConnections) -> None:
        found, last = self._ledger.list(
            asked.after, CONNECTIONS_AT_ONCE, asked.namespace, asked.pod
        )
        self._answer(messages.Connections(asked.number, tuple(found), last))

    def _gauges(self) -> Iterator[tuple[str, Labels, int]]:
        for (reporter, path), count in self._ledger.count().items():
            yield "istio_tcp_sockets_open", (("reporter", reporter),), count
            yield "connections_open", (("path", path), ("reporter", reporter)), count
        yield "buffered_bytes", (), BUFFERS.held
        for state, count in (self._pool.count() if self._pool else {}).items():
            yield "tunnels", (("direction", "outbound"), ("state", state)), count
        count = self._inbound.tunnels if self._inbound else 0
        yield "tunnels", (("direction", "inbound"), ("state", "in_use")), count

    def _profile(self, asked: messages.AskProfile) -> None:
        if self._sampler is not None:
            self._answer(messages.Profile(asked.number, ()))
            return
        self._sampler = sampler = Sampler(asked.frequency)

        def finish() -> None:
            self._sampler = None
            self._answer(messages.Profile(asked.number, sampler.stop()))

        self._reactor.call_later(asked.seconds, finish)

    def _put_revoked(self, fd: int) -> None:
        # Read at a position: other workers share the file, and its offset with it.
        packed = os.pread(fd, os.fstat(fd).st_size, 0)
        os.close(fd)
        size = FINGERPRINT_BYTES
        found = frozenset(packed[at : at + size] for at in range(0, len(packed), size))
        if self._trust is not None:
            self._trust.revoke(found)

    def _enforce(self) -> None:
        if self._gate.enforce() > MANY_CHANGES:
            # A collection that walks 100,000 rules would stop all relaying for a tenth of a second.
            # Rules are in no cycle: what is frozen is freed as ever when it is replaced.
            gc.freeze()
        gc.enable()

    def _add_pod(self, message: messages.AddPod, fds: list[int]) -> None:
        pod = message.pod
        returning = self._returning.pop(pod.uid, None)
        self._remove_pod(pod.uid)
        identity = SpiffeId(self._trust_domain, pod.namespace, pod.service_account)
        served = ServedPod(pod, identity, fds[0], message.netns_cookie)
        if returning is not None:
            served = self._take_up(returning, served)
        for port, fd in zip(message.listener_ports, fds[1:], strict=True):
            own = socket.socket(fileno=fd)
            serve = partial(self._serve, served, self._serve_by_port[port])
            failed = partial(self._log_failure, served, "accept failed")
            served.listeners.append((port, Listening(self._reactor, own, serve, failed)))
        self._served[pod.uid] = served
        self._keep_spare()

    def _take_up(self, returning: ServedPod, served: ServedPod) -> ServedPod:
        """Let the tunnels of a pod that is back use what it has now."""
        os.close(returning.netns_fd)
        if returning.netns_cookie != served.netns_cookie and self._pool is not None:
            self._pool.close_pod(served.pod.uid)
        returning.pod, returning.identity = served.pod, served.identity
        returning.netns_fd, returning.netns_cookie = served.netns_fd, served.netns_cookie
        returning.is_leaving = False
        return returning

    def _serve(
        self, served: ServedPod, serve: Serve, accepted: socket.socket, peer: tuple[str, int]
    ) -> None:
        try:
            if self._sockets is not None:
                self._sockets.require_room(accepted)
            serve(served, accepted, peer)
        except (SidestepError, OSError) as error:
            # One connection's failure is its own.
            sockets.abort(accepted)
            self._log_failure(served, "connection failed", error)

    def _log_failure(self, served: ServedPod, message: str, error: Exception) -> None:
        if self._ledger.may_log("error", TUNNEL):
            pod = f"{served.pod.namespace}/{served.pod.name}"
            log(message, level="error", pod=pod, error=str(error))

    def _keep_spare(self) -> None:
        if self._sockets is not None:
            self._sockets.keep_spare(
                fd
                for served in self._served.values()
                for fd in (served.netns_fd, *(each.socket.fileno() for _, each in served.listeners))
            )

    def _drain_pod(self, uid: str) -> None:
        served = self._served.get(uid)
        if served is None:
            return

        def leave() -> None:
            del self._departures[uid]
            # Later than capture: what was captured was still on its way to the listeners.
            for port, listener in served.listeners:
                if port != HBONE_PORT:
                    listener.serve_queue()
                    listener.close()
            served.listeners = [found for found in served.listeners if found[0] == HBONE_PORT]
            served.is_leaving = True
            self._end_drain(uid)

        self._departures[uid] = self._reactor.call_later(DRAIN_SECONDS, leave)

    def _retire(self, has_successor: bool) -> None:
        if self._pool is not None:
            self._pool.is_retiring = True
        for served in self._served.values():
            for _port, listener in served.listeners:
                if has_successor:
                    # The kernel may have told us alone (EPOLLEXCLUSIVE) of what is in the queue.
                    listener.serve_queue()
                listener.close()
            served.listeners = []
        hears_until = time.monotonic() + (DRAIN_SECONDS if has_successor else 0.0)

        def look() -> None:
            if self._trust is not None:
                self._trust.drain_all()  # those, too, whose handshake has ended meanwhile
                if time.monotonic() >= hears_until:
                    self._trust.close_idle()
            if self._ledger.has_open or Session.open_count:
                self._reactor.call_later(RETIRE_TURN_SECONDS, look)
            else:
                self._reactor.call_soon(self._reactor.stop)

        look()

    def _end_drain(self, uid: str) -> None:
        served = self._served.get(uid)
        if served is not None and served.is_leaving and not self._gate.open_connections(uid):
            self._remove_pod(uid)
            self._answer(messages.Drained(uid))

    def _remove_pod(self, uid: str, *, comes_back: bool = False) -> None:
        served = self._served.pop(uid, None) or self._returning.pop(uid, None)
        if served is None:
            return
        if (departure := self._departures.pop(uid, None)) is not None:
            departure.cancel()
        for _port, listener in served.listeners:
            if comes_back:
                listener.serve_queue()
            listener.close()
        served.listeners = []
        if comes_back:
            self._returning[uid] = served
            return
        if self._pool is not None:
            self._pool.close_pod(uid)
        os.close(served.netns_fd)
        served.netns_fd = -1  # tunnels may still ask: the number may be another pod's by then
        self._keep_spare()


def main() -> None:
    """Run a worker on the message socket whose descriptor is the only argument."""
    keep_memory_private()
    never_stall()
    # Where memory ends, a worker and its connections do, and not the agent with all workers.
    OOM_SCORE.write_text(str(min(int(OOM_SCORE.read_text()) + OOM_HANDICAP, OOM_MOST)))
    channel = socket.socket(fileno=int(sys.argv[1]))
    keep_large_blocks()
    gc.freeze()  # what is loaded now lives as long as the process
    with suppress(KeyboardInterrupt):
        Worker(channel).run()


if __name__ == "__main__":
    main()

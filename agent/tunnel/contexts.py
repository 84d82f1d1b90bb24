"""A worker's own certificates, as TLS contexts.

A connection that needs a certificate which is not there yet waits for it, and the control process
is told so, once. A certificate that has ended is as good as none, and so is one that has not begun:
the clock was set back.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from agent.identity import der
from agent.tunnel import tls

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from agent.tunnel.messages import PutCertificate
    from agent.tunnel.reactor import Reactor

    OnContext = Callable[[ssl.SSLContext | None, str], None]

WAIT_SECONDS = 10.0


class Contexts:
    """TLS contexts by identity, made anew when a certificate comes.

    `on_wanted(identity)` is called when a connection begins to wait.
    """

    def __init__(self, reactor: Reactor, on_wanted: Callable[[str], None]) -> None:
        self._reactor = reactor
        self._on_wanted = on_wanted
        self._certificates: dict[str, PutCertificate] = {}
        self._valid: dict[str, tuple[float, float]] = {}  # from, until
        self._contexts: dict[tuple[str, bool], ssl.SSLContext] = {}
        self._waiting: dict[str, list[Callable[[str], None]]] = {}

    def put(self, certificate: PutCertificate) -> None:
        """Use a certificate from now on; whoever waits for it goes on."""
        identity = certificate.identity
        self._certificates[identity] = certificate
        leaf = der.read_certificate(der.decode_pem(certificate.chain)[0])
        self._valid[identity] = leaf.not_before, leaf.not_after
        self._drop(identity)
        for proceed in self._waiting.pop(identity, ()):
            proceed("")

    def remove(self, identity: str) -> None:
        """Forget an identity; tunnels that are open go on."""
        self._certificates.pop(identity, None)
        self._valid.pop(identity, None)
        self._drop(identity)

    def _drop(self, identity: str) -> None:
        for is_server in (False, True):
            self._contexts.pop((identity, is_server), None)

    def is_current(self, identity: str, context: ssl.SSLContext) -> bool:
        """Whether `client` gives this one now."""
        return self._contexts.get((identity, False)) is context

    def client(self, identity: str, on_context: OnContext) -> None:
        """Give the context for dialing as `identity`: at once, or when there is one.

        `on_context(None, reason)` if there is none after ten seconds.
        """
        self._get(identity, False, on_context)

    def server(self, identity: str, on_context: OnContext) -> None:
        """Give the context for answering as `identity`; see `client`."""
        self._get(identity, True, on_context)

    def _get(self, identity: str, is_server: bool, on_context: OnContext) -> None:
        begin, end = self._valid.get(identity, (0.0, 0.0))
        if begin <= time.time() < end:
            self._give(identity, is_server, on_context)
            return
        is_first = identity not in self._waiting

        def proceed(reason: str) -> None:
            timer.cancel()
            if reason:
                on_context(None, reason)
            else:
                self._give(identity, is_server, on_context)

        def on_timeout() -> None:
            waiting = self._waiting.get(identity, [])
            if proceed in waiting:
                waiting.remove(proceed)
                if not waiting:
                    del self._waiting[identity]
            had = (
                "the certificate of {} has ended, or has not begun"
                if identity in self._valid
                else "there is no certificate for {} yet"
            )
            proceed(f"{had.format(identity)}: see `sidestep certs`")

        timer = self._reactor.call_later(WAIT_SECONDS, on_timeout)
        self._waiting.setdefault(identity, []).append(proceed)
        if is_first:
            self._on_wanted(identity)

    def _give(self, identity: str, is_server: bool, on_context: OnContext) -> None:
        key = (identity, is_server)
        if key not in self._contexts:
            try:
                self._contexts[key] = tls.build_context(
                    self._certificates[identity], is_server=is_server
                )
            except OSError as error:  # ssl.SSLError is one; so is the want of a descriptor
                on_context(None, f"the certificate of {identity} cannot be used: {error}")
                return
        on_context(self._contexts[key], "")

"""The certificates of a node: asked for, renewed, shown, and told to the workers.

The shell of `rotation`, which decides when. What the agent trusts is what the mounted file says and
what the CA said last, together: so a new root is trusted everywhere before anybody shows a
certificate of it, whichever way the news comes.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cryptography import x509

from agent.errors import IdentityError, RevocationInvalid
from agent.identity import der, files, revocation
from agent.identity.authority import PARSE_ERRORS
from agent.identity.rotation import Rotation, Urgency
from agent.identity.verify import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from agent.identity.issuer import Certificate, Issuer
    from agent.model.identity import SpiffeId

log = logging.getLogger(__name__)
LONGEST_NAP_SECONDS = 5.0  # the clock may be set meanwhile


@dataclass
class Counters:
    """What happened since the start; failures by reason."""

    issued: int = 0
    renewed: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    revocation_failed: int = 0


class CertificateKeeper:
    """Keeps one certificate for each identity that is wanted.

    `on_certificate(certificate, roots)` is called for each that is new, and for all when what is
    trusted changed; `on_revoked(fingerprints)` when the list of revoked ones changed.
    """

    def __init__(
        self,
        issuer: Issuer,
        roots: Path,
        revoked: Path | None,
        random: Callable[[], float],
    ) -> None:
        self.on_certificate: Callable[[Certificate, bytes], None] = lambda _issued, _roots: None
        self.on_revoked: Callable[[frozenset[bytes]], None] = lambda _fingerprints: None
        self.on_change: Callable[[], None] = lambda: None
        self.counters = Counters()
        self._issuer = issuer
        self._roots_path = roots
        self._revoked_path = revoked
        self._rotation = Rotation(random)
        self._certificates: dict[SpiffeId, Certificate] = {}
        self._from_file: tuple[bytes, ...] = ()
        self._from_authority: tuple[bytes, ...] = ()
        self._revoked: frozenset[bytes] = frozenset()
        self._revoked_problem = ""
        self._woken = asyncio.Event()

    # -- what is wanted -----------------------------------------------------------------------

    def want(self, identity: SpiffeId, *, is_waiting: bool) -> None:
        """Have a certificate; `is_waiting` if a connection waits for it."""
        urgency = Urgency.WAITING if is_waiting else Urgency.PREFETCH
        self._rotation.want(identity, urgency, time.time())
        self._woken.set()

    def forget(self, identity: SpiffeId) -> None:
        """The last pod with the identity is gone."""
        self._rotation.forget(identity)
        self._certificates.pop(identity, None)
        self._woken.set()

    def certificates(self) -> list[tuple[Certificate, bytes]]:
        """List what there is, each with what is trusted: for a new worker."""
        return [(certificate, self.trusted) for certificate in self._certificates.values()]

    @property
    def trusted(self) -> bytes:
        """Every root that is trusted now, PEM."""
        roots = dict.fromkeys((*self._from_file, *self._from_authority))
        return "".join(ssl.DER_cert_to_PEM_cert(root) for root in roots).encode()

    @property
    def revoked(self) -> frozenset[bytes]:
        """The fingerprints of revoked certificates."""
        return self._revoked

    def revoked_identities(self) -> frozenset[SpiffeId]:
        """The identities whose present certificate is a revoked one."""
        return frozenset(
            identity
            for identity, found in self._certificates.items()
            if _leaf_fingerprint(found) in self._revoked
        )

    # -- work ---------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Ask and renew until `stop`."""
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(self._follow_files(stop))
            stopping = tasks.create_task(self._wake_at(stop))
            requests: set[asyncio.Task[None]] = set()
            while not stop.is_set():
                self._woken.clear()
                for identity in self._rotation.take(time.time()):
                    request = tasks.create_task(self._request(identity))
                    requests.add(request)
                    request.add_done_callback(requests.discard)
                await self._nap()
            for task in (following, stopping, *requests):
                task.cancel()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._woken.set()

    async def _nap(self) -> None:
        due = self._rotation.next_due()
        seconds = LONGEST_NAP_SECONDS if due is None else due - time.time()
        try:
            async with asyncio.timeout(min(max(seconds, 0.0), LONGEST_NAP_SECONDS)):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _request(self, identity: SpiffeId) -> None:
        try:
            issued = await self._issuer.issue(identity)
        except IdentityError as error:
            failed = self.counters.failed
            failed[error.reason] = failed.get(error.reason, 0) + 1
            self._rotation.on_failed(identity, error.reason, str(error), time.time())
            log.warning(
                "no certificate could be had",
                extra={"identity": str(identity), "reason": error.reason, "detail": str(error)},
            )
        else:
            self._take_over(issued)
        self._woken.set()
        self.on_change()

    def _take_over(self, issued: Certificate) -> None:
        self.counters.issued += 1
        if not self._rotation.on_issued(issued.identity, issued.expires, time.time()):
            return
        is_renewal = issued.identity in self._certificates
        self.counters.renewed += is_renewal
        self._certificates[issued.identity] = issued
        before = self.trusted
        self._from_authority = tuple(der.decode_pem(issued.roots))
        if self.trusted == before:
            self.on_certificate(issued, before)
        else:
            self._tell_all()
        if self._revoked_problem:
            self._read_revoked()  # its issuer may be known now
        log.info(
            "certificate renewed" if is_renewal else "certificate received",
            extra={"identity": str(issued.identity), "expires": int(issued.expires)},
        )

    def _tell_all(self) -> None:
        trusted = self.trusted
        for certificate in self._certificates.values():
            self.on_certificate(certificate, trusted)

    # -- files --------------------------------------------------------------------------------

    async def _follow_files(self, stop: asyncio.Event) -> None:
        paths = [path for path in (self._roots_path, self._revoked_path) if path is not None]
        async for _ in files.changes((path.parent for path in paths), stop):
            self._read_roots()
            self._read_revoked()
            self.on_change()

    def _read_roots(self) -> None:
        try:
            roots = tuple(der.decode_pem(self._roots_path.read_bytes()))
            for root in roots:
                x509.load_der_x509_certificate(root)
        except (OSError, ValueError, *PARSE_ERRORS) as error:
            log.warning("the roots' file cannot be read", extra={"detail": str(error)})
            return
        if roots and roots != self._from_file:
            before = self.trusted
            self._from_file = roots
            if self.trusted != before:
                self._tell_all()
                log.info("trusted roots changed", extra={"count": len(roots)})

    def _read_revoked(self) -> None:
        if self._revoked_path is None:
            return
        try:
            content = self._revoked_path.read_bytes()
            revoked = revocation.parse_revocations(content, self._issuers())
        except FileNotFoundError:
            revoked = frozenset()  # nothing is revoked yet
        except (OSError, RevocationInvalid) as error:
            if str(error) != self._revoked_problem:
                self._revoked_problem = str(error)
                self.counters.revocation_failed += 1
                log.error(
                    "the list of revoked certificates cannot be used; the last one stays in force",
                    extra={"reason": RevocationInvalid.reason, "detail": str(error)},
                )
            return
        self._revoked_problem = ""
        if revoked != self._revoked:
            self._revoked = revoked
            self.on_revoked(revoked)
            log.info("revoked certificates changed", extra={"count": len(revoked)})

    def _issuers(self) -> Iterable[x509.Certificate]:
        ders = set(der.decode_pem(self.trusted))
        for certificate in self._certificates.values():
            ders.update(der.decode_pem(certificate.chain)[1:])
        return [x509.load_der_x509_certificate(found) for found in ders]

    # -- shown --------------------------------------------------------------------------------

    def expiries(self) -> list[dict[str, float | str | None]]:
        """Return when the certificate of each identity ends, for metrics."""
        return [
            {"identity": str(identity), "expires": found.expires if found else None}
            for identity, found in (
                (identity, self._certificates.get(identity)) for identity in self._rotation.entries
            )
        ]

    def kept(self) -> list[tuple[str, Certificate | None, bytes, str]]:
        """List identity, certificate, trusted roots and last failure of all that is wanted."""
        return [
            (str(identity), self._certificates.get(identity), self.trusted, entry.detail)
            for identity, entry in self._rotation.entries.items()
        ]

    def describe(self) -> dict[str, object]:
        """Return what is known, for the admin socket: never a key."""
        now = time.time()
        rows = []
        for identity, entry in self._rotation.entries.items():
            certificate = self._certificates.get(identity)
            chain = [] if certificate is None else der.decode_pem(certificate.chain)
            rows.append(
                {
                    "identity": str(identity),
                    "state": entry.state(now),
                    "serial": f"{der.read_certificate(chain[0]).serial:x}" if chain else None,
                    "not_before": _text(certificate.not_before if certificate else None),
                    "not_after": _text(certificate.expires if certificate else None),
                    "next_request": _text(entry.due),
                    "failures": entry.failures,
                    "last_failure": f"{entry.reason}: {entry.detail}" if entry.reason else None,
                    "last_failure_at": _text(entry.failed_at),
                    "chain": [_describe_certificate(found) for found in chain],
                }
            )
        return {
            "certificates": rows,
            "roots": [_describe_certificate(root) for root in der.decode_pem(self.trusted)],
            "revoked": len(self._revoked),
            "revocation_problem": self._revoked_problem or None,
            "counters": {
                "issued": self.counters.issued,
                "renewed": self.counters.renewed,
                "failed": dict(self.counters.failed),
                "revocation_failed": self.counters.revocation_failed,
            },
        }


def _leaf_fingerprint(certificate: Certificate) -> bytes:
    facts = der.read_certificate(der.decode_pem(certificate.chain)[0])
    return fingerprint(facts.issuer, facts.serial)


def _text(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat("T", "seconds")


def _describe_certificate(found: bytes) -> dict[str, object]:
    certificate = x509.load_der_x509_certificate(found)
    facts = der.read_certificate(found)
    named = certificate.subject.rfc4514_string()
    return {
        "subject": named or ", ".join(text for _kind, text in facts.names),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{facts.serial:x}",
        "not_before": _text(facts.not_before),
        "not_after": _text(facts.not_after),
    }

"""How the CA's key is kept, and how a root is replaced.

A store holds named entries, as a directory or a Kubernetes Secret does. The names are those that
operators of Istio know from its Secret `cacerts`, so a CA of theirs can be given as it is:

    ca-cert.pem      the certificate that signs          ca-key.pem     its key
    cert-chain.pem   from there to a root, may be absent root-cert.pem  every root that is trusted
    next-cert.pem, next-key.pem    a root that is trusted and does not sign yet
    rotation.json                  the stage, and since when

A root is replaced in three stages, so that at each moment both ends of a connection trust what the
other shows:

    trust    a new root is made and trusted beside the old one; the old one signs
    sign     the new one signs; both are trusted
    finish   the old one is trusted no more

The next stage is refused until every certificate in use must have been renewed since the last one.
Entries are written in an order that leaves a working CA, or the same command to run again, wherever
it is cut off.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, Protocol

from agent.errors import NoAuthority, RotationRefused
from agent.identity import files, keys
from agent.identity.authority import Authority, Material, create_root, load_certificates

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

CERTIFICATE, KEY, CHAIN, ROOTS = "ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"
NEXT_CERTIFICATE, NEXT_KEY, ROTATION = "next-cert.pem", "next-key.pem", "rotation.json"
ENTRIES = (CERTIFICATE, KEY, CHAIN, ROOTS, NEXT_CERTIFICATE, NEXT_KEY, ROTATION)
SECRET = frozenset({KEY, NEXT_KEY})
Stage = Literal["trust", "sign", "finish"]


class Store(Protocol):
    """Keeps the entries."""

    def read(self) -> dict[str, bytes]:
        """Return what is there (KeyExposed if others can read a key)."""
        ...

    def write(self, entries: Mapping[str, bytes | None]) -> None:
        """Put entries in this order; None removes one."""
        ...

    def changes(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """Yield now and whenever an entry may have changed, until `stop`."""
        ...


class DirectoryStore:
    """Entries are files; those with keys have mode 0600, or are not read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self) -> dict[str, bytes]:
        """Return what is there (KeyExposed if others can read a key)."""
        found = {}
        for name in ENTRIES:
            path = self._directory / name
            try:
                found[name] = keys.read_private(path) if name in SECRET else path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise NoAuthority(f"{path} cannot be read: {error.strerror}") from error
        return found

    def write(self, entries: Mapping[str, bytes | None]) -> None:
        """Put files in this order, each whole or not at all; None removes one."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name, content in entries.items():
                path = self._directory / name
                if content is None:
                    path.unlink(missing_ok=True)
                    continue
                keys.write_private(path, content)
                if name not in SECRET:
                    path.chmod(0o644)
        except OSError as error:
            raise NoAuthority(f"{self._directory} cannot be written: {error}") from error

    async def changes(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """Yield now and whenever a file changed, until `stop`."""
        async for _ in files.changes([self._directory], stop):
            yield


def open_authority(store: Store, organization: str) -> Authority:
    """Return the CA that is kept, or make and keep a new root if the store has none."""
    entries = store.read()
    if KEY not in entries and CERTIFICATE not in entries:
        made = create_root(organization)
        store.write({KEY: made.key, CERTIFICATE: made.certificate, ROOTS: made.roots})
        entries = store.read()
    return Authority(_material(entries))


def _material(entries: Mapping[str, bytes]) -> Material:
    if KEY not in entries and CERTIFICATE not in entries:
        raise NoAuthority(f"there is no CA: neither {CERTIFICATE} nor {KEY} is there")
    for name in (CERTIFICATE, KEY):
        if name not in entries:
            raise NoAuthority(f"{name} is missing, though the other half of the CA is there")
    return Material(
        entries[CERTIFICATE],
        entries[KEY],
        entries.get(CHAIN, b""),
        entries.get(ROOTS) or entries[CERTIFICATE],
    )


def describe_rotation(entries: Mapping[str, bytes]) -> tuple[Stage | None, datetime | None]:
    """Return the stage that was last taken and when; None outside a rotation."""
    if ROTATION not in entries:
        return None, None
    try:
        told = json.loads(entries[ROTATION])
        stage, since = told["stage"], datetime.fromisoformat(told["since"])
    except (ValueError, KeyError, TypeError) as error:
        raise NoAuthority(f"{ROTATION} cannot be read: {error}") from error
    if stage not in ("trust", "sign") or since.tzinfo is None:
        raise NoAuthority(f"{ROTATION} has no stage that is known, or a time without a zone")
    return stage, since


def rotate_root(
    store: Store, stage: Stage, organization: str, patience: timedelta, now: datetime
) -> None:
    """Take one stage of the rotation; `patience` is the longest life of a certificate in use.

    Raises:
        NoAuthority: the store holds no CA, or half of one.
        RotationRefused: it is not the next stage, or it is too early.
    """
    entries = store.read()
    authority = Authority(_material_for(entries, stage))
    current, since = describe_rotation(entries)
    wanted = {"trust": None, "sign": "trust", "finish": "sign"}[stage]
    if current != wanted:
        follows = {None: "trust", "trust": "sign", "sign": "finish"}[current]
        raise RotationRefused(f"the next stage of this CA's root is {follows}, not {stage}")
    if not authority.is_root:
        raise RotationRefused(
            "this CA signs with an intermediate from outside: its root is replaced where it was "
            "made, and both roots given in root-cert.pem meanwhile"
        )
    if since is not None and now < since + patience:
        raise RotationRefused(
            f"certificates from before the stage {current} are in use until "
            f"{(since + patience).isoformat(timespec='seconds')}; connections would fail"
        )
    if stage == "trust":
        made = create_root(organization)
        store.write(
            {
                NEXT_KEY: made.key,
                NEXT_CERTIFICATE: made.certificate,
                ROOTS: authority.bundle.encode() + made.certificate,
                ROTATION: _note(stage, now),
            }
        )
    elif stage == "sign":
        for name in (NEXT_CERTIFICATE, NEXT_KEY):
            if name not in entries:
                raise NoAuthority(f"{name} is missing, though the stage {current} has made it")
        store.write(
            {
                CERTIFICATE: entries[NEXT_CERTIFICATE],
                KEY: entries[NEXT_KEY],
                ROTATION: _note(stage, now),
                NEXT_CERTIFICATE: None,
                NEXT_KEY: None,
            }
        )
    else:
        store.write({ROOTS: entries[CERTIFICATE], ROTATION: None})


def _material_for(entries: Mapping[str, bytes], stage: Stage) -> Material:
    """Return the CA; where `sign` was cut off between its two halves, the one to be completed."""
    certificate = entries.get(CERTIFICATE)
    if stage == "sign" and certificate and certificate == entries.get(NEXT_CERTIFICATE):
        return Material(certificate, entries.get(NEXT_KEY, b""), b"", entries.get(ROOTS, b""))
    return _material(entries)


def _note(stage: Stage, now: datetime) -> bytes:
    return json.dumps({"stage": stage, "since": now.astimezone(UTC).isoformat()}).encode()


def list_roots(entries: Mapping[str, bytes]) -> list[str]:
    """Name the trusted roots by serial number, for people."""
    return [f"{root.serial_number:x}" for root in load_certificates(entries.get(ROOTS, b""), ROOTS)]

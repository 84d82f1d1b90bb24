"""Put the plugin on a node, keep it there, and take it away without a trace.

    install     plugin into the directory of plugins, record, entry in the primary network
    uninstall   record, entry, plugin: in this order, so that whatever is left behind is harmless
    keep_out    uninstall, and have every watch leave the node alone, until somebody installs
    watch       install, and put the entry back when somebody has taken it away

Each file is written beside its name, synced and renamed, so a reader or a power cut sees the old
one or the new one. Installers and uninstallers take turns by a lock on the directory of networks.
One `watch` keeps a node at a time, by a lock on the directory of the record: two versions, as there
are while one is updated, would take each other's plugin away for ever. The next begins when the one
before has ended.

The record says that the plugin is installed: without it the plugin passes every pod on. So it also
ends a `watch` that goes on while somebody uninstalls. Where the kubelet would start the next one,
`keep_out` leaves a file beside the record, which tells each to wait.

The first entry on a node waits until the agent serves: a node on which the agent can not run is not
closed. Later on, also after a reboot, the entry stands whether or not the agent is there: until it
comes, pods of the mesh wait.

Needs the standard library alone. Called by the command line.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import stat
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cni.conflist import (
    PLUGIN_TYPE,
    SUFFIXES,
    Delete,
    Write,
    find_primary,
    has_entry,
    plan_install,
    plan_uninstall,
)
from cni.contention import MOST_STRIKES, TRUCE_SECONDS, WINDOW_SECONDS, Contention
from cni.inotify import DirectoryWatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cni.conflist import Change

log = logging.getLogger(__name__)
SHIM = Path(__file__).with_name("shim")
RECORD, KEPT_OUT = "installed", "kept-out"
DRAFT = f".by-{PLUGIN_TYPE}.draft"
# Some networks are written in place, or on file systems that tell nobody.
RECHECK_SECONDS = 60.0
RETRY_SECONDS = 1.0
PLUGIN_MODE = 0o755
CONFIG_MODE = 0o600  # a new file, as others have it: it may carry credentials
STATUS_SECONDS = 40.0


class InstallError(Exception):
    """The node cannot be brought to the wished state; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are on the node; all but `networks` and `plugins` by the host's own names."""

    networks: Path
    plugins: Path
    state: Path
    socket: Path
    excluded_namespaces: tuple[str, ...] = ()
    shim: Path = SHIM

    @property
    def plugin(self) -> Path:
        return self.plugins / PLUGIN_TYPE

    @property
    def record(self) -> Path:
        return self.state / RECORD

    @property
    def kept_out(self) -> Path:
        return self.state / KEPT_OUT

    def entry(self) -> dict[str, object]:
        """Return our entry in a network's list of plugins."""
        return {
            "type": PLUGIN_TYPE,
            "agentSocket": str(self.socket),
            "installedRecord": str(self.record),
            "excludeNamespaces": list(self.excluded_namespaces),
        }


def install(places: Places) -> str:
    """Install now, and return the file that has the entry (InstallError, OSError)."""
    with _turn(places):
        _put_plugin(places)
        files = _read(places.networks)
        primary = find_primary(files)
        changes = plan_install(files, places.entry())
        if primary is None:
            _apply(places.networks, changes)
            raise InstallError(
                f"{places.networks} has no network configuration yet, which the cluster's CNI "
                "brings: run `sidestep cni watch`, which waits for it"
            )
        _put_record(places)
        places.kept_out.unlink(missing_ok=True)
        _apply(places.networks, changes)
        return primary


def uninstall(places: Places) -> list[Path]:
    """Take everything away, and return the files that had something of ours.

    What is not there is no error (OSError: it cannot be taken away).
    """
    changed = _take_away(places)
    with suppress(FileNotFoundError):
        places.kept_out.unlink()
        changed.append(places.kept_out)
    with suppress(OSError):  # others may keep something there
        places.state.rmdir()
    return changed


def keep_out(places: Places) -> list[Path]:
    """Uninstall, and have every `watch` of this node wait for an `install` (OSError)."""
    with suppress(FileNotFoundError):  # each watch makes the directory, so there was none
        places.kept_out.touch()
        _sync(places.state)
    return _take_away(places)


def _take_away(places: Places) -> list[Path]:
    changed = []
    with suppress(FileNotFoundError):
        places.record.unlink()
        _sync(places.state)
        changed.append(places.record)
    with suppress(FileNotFoundError), _turn(places):
        changes = plan_uninstall(_read(places.networks))
        _apply(places.networks, changes)
        changed += [places.networks / change.name for change in changes]
        # Of installers that were killed; who is at work has the turn.
        for directory in (places.networks, places.plugins, places.state):
            for draft in directory.glob(f".*{DRAFT}"):
                draft.unlink()
                changed.append(draft)
    with suppress(FileNotFoundError):
        places.plugin.unlink()
        changed.append(places.plugin)
    return changed


def watch(places: Places, wake_fd: int) -> None:
    """Install and keep installed, until `wake_fd` is readable or somebody has uninstalled.

    Waits for the first network configuration, and for the agent where the node has no entry yet.
    Errors are logged and tried again.
    """
    keeper = _Keeper(places)
    try:
        _keep_until(keeper, places, wake_fd)
    finally:
        keeper.close()


def _keep_until(keeper: _Keeper, places: Places, wake_fd: int) -> None:
    while not _is_readable(wake_fd):
        try:
            if not keeper.is_alone():
                _wait(wake_fd, RETRY_SECONDS)
                continue
            directories = DirectoryWatch(places.networks, places.plugins)
        except OSError as error:
            keeper.tell(f"{error.filename}: {error.strerror}")
            _wait(wake_fd, RETRY_SECONDS)
            continue
        try:
            # Armed before the first look, so that no change falls between.
            while True:
                if not keeper.look():
                    return
                directories.wait(keeper.patience(), wake_fd)
                if _is_readable(wake_fd) or not places.networks.is_dir():
                    break
        finally:
            directories.close()


class _Keeper:
    """One look after the other at what should be installed."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._contention = Contention()
        self._has_begun = False
        self._had_entry = False
        self._due = 0.0
        self._told = ""
        self._lock = -1
        self._has_waited = False
        self._passed_over: frozenset[Path] = frozenset()

    def is_alone(self) -> bool:
        """Say whether no other process keeps this node, and keep others off then (OSError)."""
        if self._lock < 0:
            self._places.state.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._lock = _open_directory(self._places.state)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self._has_waited:
                log.info("another `sidestep cni watch` keeps this node; waiting for its end")
                self._has_waited = True
            return False
        return True

    def close(self) -> None:
        """Let another one keep the node."""
        if self._lock >= 0:
            os.close(self._lock)

    def patience(self) -> float:
        """Return for how long nothing need be looked at unless something changes."""
        left = self._due - time.monotonic()
        if left > 0:
            return left
        return RECHECK_SECONDS if self._had_entry or self._contention.gave_up_at else RETRY_SECONDS

    def look(self) -> bool:
        """Do what is to be done now; False if somebody has uninstalled."""
        try:
            with _turn(self._places):
                return self._look()
        except (InstallError, OSError) as error:
            self.tell(str(error))
            self._had_entry = False
            self._due = time.monotonic() + RETRY_SECONDS
            return True

    def _look(self) -> bool:
        places = self._places
        if places.kept_out.exists():
            self.tell(f"{places.kept_out} keeps us out until somebody runs `sidestep cni install`")
            self._had_entry = False
            return True
        if self._has_begun and not places.record.exists():
            log.info("the plugin was uninstalled; it is kept no more")
            return False
        _put_plugin(places)
        files = _read(places.networks)
        self._say_passed_over()
        primary = find_primary(files)
        changes = plan_install(files, places.entry())
        if primary is None:
            _apply(places.networks, changes)
            self.tell(f"{places.networks} has no network configuration yet; waiting for one")
            self._had_entry = False
            return True
        if not self._has_begun and not has_entry(files) and not places.record.exists():
            problem = _agent_problem(places)
            if problem:
                self.tell(f"the entry waits until the agent serves: {problem}")
                return True
        if not changes:
            self._keep(primary)
            return True
        if self._had_entry and self._due <= 0 and not self._may_go_on(primary):
            return True
        if time.monotonic() < self._due:
            return True
        self._due = 0.0
        _put_record(places)
        _apply(places.networks, changes)
        self._keep(primary)
        return True

    def _keep(self, primary: str) -> None:
        if not self._had_entry:
            log.info("entry is in place", extra={"file": str(self._places.networks / primary)})
        if not self._places.record.exists():
            _put_record(self._places)
        self._had_entry = self._has_begun = True
        self._due = 0.0
        self._told = ""

    def _may_go_on(self, primary: str) -> bool:
        """Whether to put the entry back that somebody has taken, now or when `_due` has come."""
        now = time.monotonic()
        was_over = self._contention.gave_up_at
        wait = self._contention.strike(now)
        where = str(self._places.networks / primary)
        if wait is None:
            if self._contention.gave_up_at != was_over:
                log.error(
                    "another program keeps taking our entry away, and we stop putting it back: "
                    "new pods start outside the mesh, and join it only when the agent sees them. "
                    "Let that program leave other plugins alone (Cilium: cni.exclusive=false)",
                    extra={
                        "file": where,
                        "times": MOST_STRIKES + 1,
                        "within_seconds": WINDOW_SECONDS,
                        "tried_again_after_seconds": TRUCE_SECONDS,
                    },
                )
            return False
        self._due = now + wait
        log.warning(
            "our entry was taken away and is put back",
            extra={"file": where, "strikes": self._contention.strikes, "after_seconds": wait},
        )
        return True

    def _say_passed_over(self) -> None:
        """Say once of each link that leads nowhere here: the runtime may follow it."""
        links = frozenset(
            path
            for path in self._places.networks.iterdir()
            if path.name.endswith(SUFFIXES) and path.is_symlink() and not path.exists()
        )
        for path in sorted(links - self._passed_over):
            log.warning(
                "a link that leads nowhere is passed over; if the runtime can follow it, that "
                "network has no entry: mount what it leads to, by the host's name",
                extra={"file": str(path), "target": str(path.readlink())},
            )
        self._passed_over = links

    def tell(self, problem: str) -> None:
        """Say once what stands in the way."""
        if problem != self._told:
            log.warning("not installed yet", extra={"detail": problem})
            self._told = problem


@contextmanager
def _turn(places: Places) -> Iterator[None]:
    """Wait for others who install or uninstall here, and hold them off."""
    fd = _open_directory(places.networks)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read(networks: Path) -> dict[str, bytes]:
    found = {}
    for path in networks.iterdir():
        if path.name.endswith(SUFFIXES):
            with suppress(FileNotFoundError, IsADirectoryError):
                found[path.name] = path.read_bytes()
    return found


def _apply(networks: Path, changes: Iterable[Change]) -> None:
    for change in changes:
        path = networks / change.name
        match change:
            case Delete():
                path.unlink(missing_ok=True)
                _sync(networks)
            case Write():
                # Where a link leads to, since a rename would put a file in place of the link.
                _replace(path.resolve(), change.content, CONFIG_MODE)


def _put_plugin(places: Places) -> None:
    try:
        wanted = places.shim.read_bytes()
    except FileNotFoundError as error:
        raise InstallError(f"{places.shim} is missing: run scripts/build_shim.sh") from error
    with suppress(FileNotFoundError):
        if places.plugin.read_bytes() == wanted and os.access(places.plugin, os.X_OK):
            return
    _replace(places.plugin, wanted, PLUGIN_MODE)


def _put_record(places: Places) -> None:
    places.state.mkdir(parents=True, exist_ok=True, mode=0o755)
    _replace(places.record, json.dumps(places.entry()).encode() + b"\n", 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that it is there as a whole or not at all; owner and mode are kept.

    One draft of a name at a time, since installers take turns. What one that was killed has left
    is not opened: whoever owns the directory may have put a link there.
    """
    draft = path.with_name(f".{path.name}{DRAFT}")
    draft.unlink(missing_ok=True)
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:  # noqa: PTH123  # a descriptor
            owner = -1, -1  # ours
            with suppress(FileNotFoundError):
                before = path.stat()
                owner = before.st_uid, before.st_gid
                if mode != PLUGIN_MODE:
                    mode = stat.S_IMODE(before.st_mode)
            # In this order: the mode of a file of somebody else's takes CAP_FOWNER to change.
            os.fchmod(fd, mode)
            os.fchown(fd, *owner)
            file.write(content)
            file.flush()
            os.fsync(fd)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = _open_directory(directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_directory(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _agent_problem(places: Places) -> str:
    """Ask the agent as a runtime would whether pods can be added; empty if so."""
    entry = places.entry() | {"cniVersion": "1.1.0", "name": "any"}
    # Not yet installed, which the plugin would take for leave to pass.
    del entry["installedRecord"]
    done = subprocess.run(
        [places.shim],
        input=json.dumps(entry).encode(),
        env={"CNI_COMMAND": "STATUS"},
        capture_output=True,
        timeout=STATUS_SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return ""
    try:
        return str(json.loads(done.stdout)["msg"])
    except (LookupError, TypeError, ValueError):
        return f"the plugin ended with {done.returncode}"


def _wait(fd: int, seconds: float) -> None:
    select.select([fd], [], [], seconds)


def _is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])

"""State from a directory of Kubernetes objects in YAML or JSON, watched.

    <directory>/*.yaml *.yml *.json            objects, several to a file if one likes
    <directory>/status/<namespace>.<pod>.yaml  what the pod's own agent published of it

A file that cannot be used is named in the log with object, field and reason, and what it said
before stays in force until it is mended or removed. The published status takes the place of the
annotation that an agent patches on a pod in a real cluster: its own agent writes, every one reads.
What cannot be written, since the disk is full, is when there is room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from agent.changes import Changes
from agent.discovery.policies import DEFAULT_ROOT_NAMESPACE
from agent.discovery.reporting import log_problems
from agent.discovery.translate import REDIRECTION, ObjectProblem, SourcedObject, translate
from agent.errors import ConfigError
from agent.model.enrollment import DEFAULT_RULES, EnrollmentRules

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from agent.model.pod import LocalPod
    from agent.model.starting import StartingPod
    from agent.model.workload import Workload
    from agent.state.store import Snapshot

log = logging.getLogger(__name__)
MOST_BYTES = 8 << 20
UNSETTLED_NANOSECONDS = 1_000_000_000
SUFFIXES = (".yaml", ".yml", ".json")
STATUS = "status"
DRAFT = ".draft"  # what is written, until it is whole
LOOK_AGAIN_SECONDS = 0.1  # where something could not be written, or is away

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_objects(path: Path) -> list[SourcedObject]:
    """Return the objects of one file (ObjectProblem if it is not YAML of objects)."""
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            detail = f"is larger than {MOST_BYTES >> 20} MiB; split it into several files"
            raise ObjectProblem(name, "file", "size", detail)
        documents = list(yaml.load_all(data.decode(), Loader=_Loader))
    # A ValueError is also what PyYAML says to the date 2001-13-01 and to very long numbers.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise ObjectProblem(name, "file", "content", f"cannot be read: {detail}") from error
    objects = []
    for number, document in enumerate(documents, start=1):
        if document is None:
            continue
        if not isinstance(document, dict):
            raise ObjectProblem(name, f"document {number}", "content", "is not an object")
        objects.append(SourcedObject(name, document))
    return objects


@dataclass(frozen=True, slots=True)
class _Parsed:
    """What a file said at one time, and when that was, by what the kernel says of it."""

    stamp: tuple[int, ...] | None  # None: it may have changed unseen since
    objects: list[SourcedObject]
    problems: tuple[ObjectProblem, ...]


class DirectorySource:
    """Reads what changed at each change; remembers the last good content of each file."""

    def __init__(
        self,
        directory: Path,
        root_namespace: str = DEFAULT_ROOT_NAMESPACE,
        rules: EnrollmentRules = DEFAULT_RULES,
    ) -> None:
        """Name the directory (ConfigError if it is not there)."""
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory of Kubernetes objects")
        self._directory = directory
        self._root_namespace = root_namespace
        self._rules = rules
        self._status = directory / STATUS
        self._status.mkdir(exist_ok=True)
        self._good: dict[Path, list[SourcedObject]] = {}
        self._parsed: dict[Path, _Parsed] = {}
        self._unwritten: dict[Path, str] = {}  # of what was published
        self._is_away = False
        self._wake: Callable[[], None] = lambda: None  # whoever watches, to write it
        self.problems: tuple[ObjectProblem, ...] = ()

    async def watch(self, stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        """Yield what the directory says, now and after each change, until `stop`.

        While it is away, what it said holds.
        """
        latest: Snapshot | None = None
        # The first reading comes when the watch is armed, so no change falls between.
        with Changes(self._directory, ignored_suffix=DRAFT) as changes:
            self._wake = changes.wake
            has_changed = True
            while not stop.is_set():
                self._write()
                if has_changed:
                    for directory in (self._directory, self._status):
                        changes.follow(directory)  # it may be another one now
                    snapshot = await self._read_aside() or latest
                    if snapshot is not None and snapshot != latest:
                        latest = snapshot
                        yield snapshot
                again = LOOK_AGAIN_SECONDS if self._unwritten or self._is_away else None
                # Of a directory that comes back nobody tells.
                has_changed = await changes.wait(stop, again) or self._is_away

    async def _read_aside(self) -> Snapshot | None:
        """Read in a thread: some thousand objects take a second. None if the directory is away."""
        try:
            snapshot = await asyncio.to_thread(self.read)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._directory.is_dir():
                raise
            if not self._is_away:
                log.warning("objects are away, what they said holds", extra={"error": str(error)})
            self._is_away = True
            return None
        self._is_away = False
        return snapshot

    def read(self) -> Snapshot:
        """Say what the directory says now; only files that changed are read and parsed again."""
        problems: list[ObjectProblem] = []
        good: dict[Path, list[SourcedObject]] = {}
        before, self._parsed = self._parsed, {}
        for path in sorted(self._directory.iterdir()):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            parsed = self._parse(path, before.get(path))
            problems += parsed.problems
            # A file that was never good still says what its usable objects say.
            is_good = all(problem.is_partial for problem in parsed.problems)
            good[path] = parsed.objects if is_good else self._good.get(path, parsed.objects)
        self._good = good
        status = self._read_status(problems, before)
        translation = translate(
            [_with_status(source, status) for objects in good.values() for source in objects],
            self._root_namespace,
            self._rules,
        )
        named = {str(problem): problem for problem in (*problems, *translation.problems)}
        known, self.problems = self.problems, tuple(named.values())
        log_problems(known, self.problems)
        return translation.snapshot

    def _parse(self, path: Path, known: _Parsed | None) -> _Parsed:
        """Return what a file says, from memory if it is the one that was parsed before."""
        stamp = _stamp(path)
        if known is None or stamp is None or known.stamp != stamp:
            try:
                objects = read_objects(path)
                # What an agent published is no Kubernetes object.
                is_status = path.parent == self._status
                problems = () if is_status else translate(objects, self._root_namespace).problems
            except ObjectProblem as problem:
                objects, problems = [], (problem,)
            known = _Parsed(stamp, objects, problems)
        self._parsed[path] = known
        return known

    def _read_status(
        self, problems: list[ObjectProblem], before: dict[Path, _Parsed]
    ) -> dict[tuple[str, str], str]:
        status = {}
        for path in sorted(self._status.glob("*.yaml")):
            if not path.is_file():  # reading a FIFO would wait for somebody who writes
                continue
            namespace, _, pod = path.stem.partition(".")
            parsed = self._parse(path, before.get(path))
            for source in parsed.objects:
                status[namespace, pod] = str(source.body.get("redirection"))
            # What is wrong with a file that went away while we read is of no interest.
            problems += parsed.problems if path.exists() else ()
        return status

    async def ask_for_pod(self, _namespace: str, _name: str) -> StartingPod | None:
        """Know nothing beyond the files that are followed."""
        return None

    def publish(self, pod: LocalPod | Workload, redirection: str | None) -> None:
        """Say for all agents whether a pod of this node is captured; None takes it back."""
        path = self._status / f"{pod.namespace}.{pod.name}.yaml"
        if redirection is None:
            self._unwritten.pop(path, None)
            path.unlink(missing_ok=True)
            return
        has_room = not self._unwritten
        self._unwritten[path] = f"redirection: {redirection}\n"
        if has_room and (problem := self._write()):
            log.error("what is published is not written yet", extra={"detail": str(problem)})
            self._wake()

    def _write(self) -> OSError | None:
        """Write what was published and is not there; return why something could not be."""
        for path, text in list(self._unwritten.items()):
            try:
                # What an agent before us wrote needs no room.
                if not path.exists() or path.read_text() != text:
                    # Renamed into place, so that nobody reads a half. The watch ignores drafts:
                    # one that cannot be written would have us look, and write it again, at once.
                    draft = path.with_suffix(DRAFT)
                    draft.write_text(text)
                    draft.replace(path)
            except OSError as error:
                return error
            del self._unwritten[path]
        return None

    def report(self, pod: LocalPod, reason: str, note: str) -> None:
        """Do nothing: a directory has no Events, and the log and `sidestep pods` say it."""

    async def is_withdrawn(self) -> bool:
        """Say no: whoever takes agents away here says so by `sidestep uninstall`."""
        return False

    async def close(self) -> None:
        """Do nothing: what was published is written."""


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever a file does; None if the next change might not show.

    A file's times move in steps of some milliseconds, so one that was written a moment ago may be
    written again without a trace.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    if time.time_ns() - found.st_ctime_ns < UNSETTLED_NANOSECONDS:
        return None
    # The time of the last change of the inode, too: copying tools set the other one back.
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _with_status(source: SourcedObject, status: dict[tuple[str, str], str]) -> SourcedObject:
    metadata = source.body.get("metadata")
    if source.body.get("kind") != "Pod" or not isinstance(metadata, dict):
        return source
    namespace, name = metadata.get("namespace", "default"), metadata.get("name")
    annotations = metadata.get("annotations") or {}
    if not (isinstance(namespace, str) and isinstance(name, str) and isinstance(annotations, dict)):
        return source  # the translator says what is wrong with it
    published = status.get((namespace, name))
    annotations = {key: value for key, value in annotations.items() if key != REDIRECTION}
    if published is not None:
        annotations[REDIRECTION] = published
    body = source.body | {"metadata": metadata | {"annotations": annotations}}
    return SourcedObject(source.file, body)

"""State from a directory of Kubernetes objects in YAML or JSON, watched.

    <directory>/*.yaml *.yml *.json            objects, several to a file if one likes
    <directory>/status/<namespace>.<pod>.yaml  what the pod's own agent published of it

A file that cannot be used is named in the log with object, field and reason, and what it said
before stays in force until it is mended or removed. The published status takes the place of the
annotation that an agent patches on a pod in a real cluster: its own agent writes, every one reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import watchfiles
import yaml

from agent.discovery.policies import DEFAULT_ROOT_NAMESPACE
from agent.discovery.reporting import log_problems
from agent.discovery.translate import REDIRECTION, ObjectProblem, SourcedObject, translate
from agent.errors import ConfigError
from agent.model.enrollment import DEFAULT_RULES, EnrollmentRules

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator
    from pathlib import Path

    from agent.model.pod import LocalPod
    from agent.model.workload import Workload
    from agent.state.store import Snapshot

SUFFIXES = (".yaml", ".yml", ".json")
STATUS = "status"
# Writers often touch several files at once; half a second late would break the promise of one.
DEBOUNCE_MILLISECONDS = 50
STEP_MILLISECONDS = 10

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_objects(path: Path) -> list[SourcedObject]:
    """Return the objects of one file (ObjectProblem if it is not YAML of objects)."""
    name = str(path)
    try:
        documents = list(yaml.load_all(path.read_text(), Loader=_Loader))
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


class DirectorySource:
    """Reads the directory at each change; remembers the last good content of each file."""

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
        self.problems: tuple[ObjectProblem, ...] = ()

    async def watch(self, stop: asyncio.Event) -> AsyncIterator[Snapshot]:
        """Yield what the directory says, now and after each change, until `stop`."""
        changes = watchfiles.awatch(
            self._directory,
            watch_filter=lambda _change, path: path.endswith(SUFFIXES),
            debounce=DEBOUNCE_MILLISECONDS,
            step=STEP_MILLISECONDS,
            stop_event=stop,
            # Also yields without a change, first when the watch is armed: so the first reading
            # comes after it, and no change falls between.
            yield_on_timeout=True,
            rust_timeout=100,
        )
        latest: Snapshot | None = None
        async for change in changes:
            if change or latest is None:
                snapshot = self.read()
                if snapshot != latest:
                    latest = snapshot
                    yield snapshot

    def read(self) -> Snapshot:
        """Read everything now."""
        problems: list[ObjectProblem] = []
        good: dict[Path, list[SourcedObject]] = {}
        for path in sorted(self._directory.iterdir()):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            try:
                objects = read_objects(path)
                wrong = translate(objects, self._root_namespace).problems
            except ObjectProblem as problem:
                objects, wrong = [], (problem,)
            problems += wrong
            # A file that was never good still says what its usable objects say.
            good[path] = self._good.get(path, objects) if wrong else objects
        self._good = good
        status = self._read_status(problems)
        translation = translate(
            [_with_status(source, status) for objects in good.values() for source in objects],
            self._root_namespace,
            self._rules,
        )
        named = {str(problem): problem for problem in (*problems, *translation.problems)}
        before, self.problems = self.problems, tuple(named.values())
        log_problems(before, self.problems)
        return translation.snapshot

    def _read_status(self, problems: list[ObjectProblem]) -> dict[tuple[str, str], str]:
        status = {}
        for path in sorted(self._status.glob("*.yaml")):
            if not path.is_file():  # reading a FIFO would wait for somebody who writes
                continue
            namespace, _, pod = path.stem.partition(".")
            try:
                for source in read_objects(path):
                    status[namespace, pod] = str(source.body.get("redirection"))
            except ObjectProblem as problem:
                if path.exists():  # else it went away while we read
                    problems.append(problem)
        return status

    def publish(self, pod: LocalPod | Workload, redirection: str | None) -> None:
        """Say for all agents whether a pod of this node is captured; None takes it back."""
        path = self._status / f"{pod.namespace}.{pod.name}.yaml"
        if redirection is None:
            path.unlink(missing_ok=True)
            return
        # Renamed into place, so that nobody reads a half; the watch does not see the name before.
        draft = path.with_suffix(".draft")
        draft.write_text(f"redirection: {redirection}\n")
        draft.replace(path)

    def report(self, pod: LocalPod, reason: str, note: str) -> None:
        """Do nothing: a directory has no Events, and the log and `sidestep pods` say it."""

    async def close(self) -> None:
        """Do nothing: what was published is written."""


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

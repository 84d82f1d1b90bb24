"""Session rules: what a missing privilege means, and the proof that nothing is left behind.

A test marked `root` is skipped without privilege; with REQUIRE_ROOT=1 (`make test`, CI) the
whole run is refused instead, so that a skip can never pass for a success.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from tests.support.namespaces import loaded, network

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

__all__ = ["loaded", "network"]
MACHINE_LOCK_PATH = Path("/run/lock/sidestep-tests.lock")
MACHINE_LOCK = pytest.StashKey[IO[str]]()
MEASURED = pytest.StashKey[list[str]]()
REQUIRE_ROOT = os.environ.get("REQUIRE_ROOT") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="root is missing"))


def pytest_sessionstart() -> None:
    if REQUIRE_ROOT and os.geteuid() != 0:
        raise pytest.UsageError("root is missing, and REQUIRE_ROOT=1 allows no skip")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_ROOT and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and REQUIRE_ROOT=1 allows no skip"
    return report


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that puts a line under `measured` at the end of the run."""
    return request.config.stash.setdefault(MEASURED, []).append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if lines := config.stash.get(MEASURED, []):
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)


def list_leftovers() -> set[str]:
    """What tests could leave on the machine: namespaces, pins, cgroups, links."""
    places = (
        "/run/netns",
        "/sys/fs/bpf",
        "/sys/fs/cgroup/unified",
        "/sys/class/net",
        "/run/sidestep",
        "/var/lib/sidestep",
    )
    return {str(path) for place in places if Path(place).is_dir() for path in Path(place).iterdir()}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Wait for other sessions on this kernel: their namespaces would look like leftovers."""
    if any(item.get_closest_marker("root") for item in session.items):
        lock = session.config.stash[MACHINE_LOCK] = MACHINE_LOCK_PATH.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)


def pytest_unconfigure(config: pytest.Config) -> None:
    lock = config.stash.get(MACHINE_LOCK, None)
    if lock is not None:
        lock.close()


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = list_leftovers()
    yield
    # Without the lock, what is new may be another session's; and no test here makes anything.
    if MACHINE_LOCK in request.config.stash:
        assert list_leftovers() - before == set()

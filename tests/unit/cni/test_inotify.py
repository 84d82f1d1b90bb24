"""A change is told by name, and none is lost for being one of many."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cni.inotify import CONTENTS, DirectoryWatch

KEPT = Path("/proc/sys/fs/inotify/max_queued_events")


def test_names_of_what_changed_are_told_once(tmp_path: Path) -> None:
    with contextlib.closing(DirectoryWatch(tmp_path)) as watch:
        (tmp_path / "a").touch()
        (tmp_path / ("long" * 20)).touch()
        (tmp_path / "a").rename(tmp_path / "b")
        assert watch.drain() == {b"a", b"b", b"long" * 20}
        assert not watch.wait(0)


def test_directory_itself_has_no_name(tmp_path: Path) -> None:
    with contextlib.closing(DirectoryWatch(tmp_path, events=CONTENTS)) as watch:
        tmp_path.chmod(0o700)
        assert watch.drain() == {b""}


def test_more_than_the_kernel_keeps_is_told_without_a_name(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.touch()
    with contextlib.closing(DirectoryWatch(tmp_path, events=CONTENTS)) as watch:
        for number in range(int(KEPT.read_text()) + 1):
            os.utime(paths[number % 2])  # the same twice in a row would be one change
        names = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                names |= watch.drain()
        assert names == {b"a", b"b", b""}

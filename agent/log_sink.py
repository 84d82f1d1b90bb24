"""Standard error that stalls nobody: what finds no room in time is lost, and counted.

A container runtime or a terminal that stops reading fills the pipe, and the next line of the log
would hold up every connection of a worker. The descriptor is opened anew, since O_NONBLOCK on ours
would be everybody's who shares it.

A disk that is full takes lines as little, until there is room again.

Called first thing by the processes that log.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import threading

NO_ROOM = (errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
TURN_SECONDS = 0.05
FLAGS = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC


class LogSink(io.TextIOBase):
    """Takes whole lines; a line is written, or lost and told of later."""

    def __init__(self, fd: int) -> None:
        """Write to `fd`, which is non-blocking and ours."""
        self._fd = fd
        self._rest = b""  # of a line that was written in part
        self._lost = 0
        self._writing = threading.Lock()  # a control process logs in several threads

    def write(self, text: str) -> int:
        """Write now or never (OSError, but not for a reader that is slow, or a full disk)."""
        # Not for ever: who has it may be ourselves, in a finalizer that the collector runs.
        if self._writing.acquire(timeout=TURN_SECONDS):
            try:
                self._write(text)
            finally:
                self._writing.release()
        else:
            self._lost += text.count("\n")
        return len(text)

    def _write(self, text: str) -> None:
        told = self._lost  # others may be lost meanwhile
        data = self._rest + self._notice() + text.encode(errors="backslashreplace")
        try:
            sent = os.write(self._fd, data)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._lost += text.count("\n")
            return
        if sent < len(data):
            # A line that has begun is ended later, so that no two run into one.
            end = data.find(b"\n", sent) + 1
            self._rest = data[sent:end]
            self._lost += data[end:].count(b"\n") - told
        else:
            self._rest = b""
            self._lost -= told

    def _notice(self) -> bytes:
        if not self._lost:
            return b""
        return json.dumps({"message": "log lines lost", "count": self._lost}).encode() + b"\n"


def never_stall() -> None:
    """Let sys.stderr stall nobody, where it can be opened anew: a socket can not."""
    if sys.stderr is None:  # it was closed when the process began
        return
    try:
        sys.stderr = LogSink(os.open("/proc/self/fd/2", FLAGS))
    except OSError:
        return

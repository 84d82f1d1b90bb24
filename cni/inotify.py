"""Wait until something in a directory changes: inotify(7), which Python's library has not.

Whatever changes is only a reason to look: what came of it is read from the directory itself. So of
an event only the name counts, for who has names that are no reason. Called by the installer and the
demo, and in an event loop by `agent.changes`.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# linux/inotify.h
IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
# Made, gone, renamed over; and the directory itself.
NAMES = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF
WRITTEN = NAMES | IN_CLOSE_WRITE
# Also what is written and not closed, or cut off, and who may read it.
CONTENTS = WRITTEN | IN_MODIFY | IN_ATTRIB
EVENTS_BYTES = 1 << 16
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, and how long the name after it is

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Watches directories from the moment that it is made; close it at the end."""

    def __init__(self, *directories: Path, events: int = WRITTEN) -> None:
        """Watch (OSError; FileNotFoundError if one is not there)."""
        self._events = events
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _last_error("inotify")
        try:
            for directory in directories:
                self.add(directory)
        except OSError:
            self.close()
            raise

    def add(self, directory: Path) -> None:
        """Watch one more (OSError); nothing changes for one that is watched already."""
        if _libc.inotify_add_watch(self._fd, os.fsencode(directory), self._events) < 0:
            raise _last_error(str(directory))

    def fileno(self) -> int:
        """Return what is readable once there was a change, until `drain`."""
        return int(self._fd)

    def drain(self) -> set[bytes]:
        """Take the changes so far for seen, and return the names of what changed.

        The name is empty where a directory itself changed, and where there were more changes than
        the kernel keeps.
        """
        data = os.read(self._fd, EVENTS_BYTES)
        names, offset = set(), 0
        while offset < len(data):
            _watch, _mask, _cookie, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + length
            names.add(data[offset - length : offset].rstrip(b"\0"))
        return names

    def wait(self, seconds: float, *wake_fds: int) -> bool:
        """Wait for a change.

        Tell whether one came before the time was up or one of `wake_fds` was readable.
        """
        ready, _, _ = select.select([self._fd, *wake_fds], [], [], seconds)
        if self._fd not in ready:
            return False
        self.drain()
        return True

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)


def _last_error(named: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), named)

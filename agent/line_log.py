"""Lines written to stderr at once: for processes that write one for each connection.

By way of the logging module a line takes 24 us instead of 15. What is rare goes through it all the
same, where a process has it (`agent.logs`); both write the same form.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from agent.loglines import TUNNEL, Format, Levels, build_line


@dataclass
class LogSettings:
    """How lines are written; one for each process, as there is one stderr."""

    form: Format = Format.JSON
    levels: Levels = field(default_factory=Levels)


LOG = LogSettings()


def log(message: str, *, level: str = "info", scope: str = TUNNEL, **fields: object) -> None:
    """Write one line to stderr.

    A line that cannot be written (a full disk, a reader that has gone) is lost: connections matter
    more.
    """
    if sys.stderr is None or not LOG.levels.wants(scope, level):
        return  # it was closed when the process began, or nobody wants to know
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = {"time": moment, "level": level, "scope": scope, "message": message}
    with suppress(OSError):
        sys.stderr.write(build_line(LOG.form, entry | fields) + "\n")

"""The log of a control process: one line for each record on stderr, fields beside the message."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from agent.line_log import LOG
from agent.loglines import Format, Levels, build_line

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
DEFAULT = Levels()


class Lines(logging.Formatter):
    """Writes records as `agent.loglines` does."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        entry = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "scope": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in record.__dict__.items() if key not in _OWN}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return build_line(self.form, entry)


class _Wanted(logging.Filter):
    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.levels = levels

    def filter(self, record: logging.LogRecord) -> bool:
        level = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
        return self.levels.wants(record.name, level)


def set_up(form: Format = Format.JSON, levels: Levels = DEFAULT) -> None:
    """Send the log to stderr, from now on in this form and at these levels."""
    LOG.form, LOG.levels = form, levels
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(form))
    handler.addFilter(_Wanted(levels))
    # What nobody wants is not even made: the least level of all is that of every logger.
    least = min((level for level in (levels.default, *dict(levels.scopes).values())), key=_rank)
    logging.basicConfig(level=_rank(least), handlers=[handler], force=True)
    # What no line shows is not found out for each: a third of the work (Python's Logging HOWTO).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _rank(level: str) -> int:
    return logging.CRITICAL + 1 if level == "off" else logging.getLevelNamesMapping()[level.upper()]

"""Say in the log which objects cannot be used, in whole or in part, each once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.discovery.translate import ObjectProblem

log = logging.getLogger(__name__)


def log_problems(before: Iterable[ObjectProblem], now: Iterable[ObjectProblem]) -> None:
    """Log the problems that were not there before."""
    known = {str(problem) for problem in before}
    for problem in now:
        if str(problem) not in known:
            log.warning(
                "part of an object cannot be used; the rest of it is in force"
                if problem.is_partial
                else "object cannot be used; the last good state stays in force",
                extra={
                    "file": problem.file,
                    "object": problem.named,
                    "field": problem.path,
                    "detail": problem.detail,
                    "reason": problem.reason,
                },
            )

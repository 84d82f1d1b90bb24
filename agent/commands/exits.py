"""Exit codes, the same for every command."""

from __future__ import annotations

FINE = 0
PROBLEM = 1  # the command did its work, and something is wrong
CANNOT_RUN = 2  # it could not do its work: wrong options, missing rights, nobody answers

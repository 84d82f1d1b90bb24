"""The error tree and docs/errors.md say the same."""

from __future__ import annotations

import re
from pathlib import Path

import agent.errors as errors

ROOT = Path(__file__).parents[2]


def reasons() -> list[str]:
    found = []
    queue: list[type[errors.SidestepError]] = [errors.SidestepError]
    while queue:
        kind = queue.pop()
        if "reason" in vars(kind):  # a subclass may share its family's reason
            found.append(kind.reason)
        queue.extend(kind.__subclasses__())
    return found


def test_every_reason_is_unique_and_snake_case() -> None:
    found = reasons()
    assert sorted(found) == sorted(set(found))
    assert all(re.fullmatch(r"[a-z][a-z_]*", reason) for reason in found)


def test_errors_page_lists_exactly_the_reasons() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    assert sorted(re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)) == sorted(reasons())

"""What the demo reads of a log, and that it does not wait for it for ever."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from agent.demo import evidence
from agent.demo.evidence import AccessLog
from agent.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_SECONDS = 2.0


def test_first_entry_from_now_on_that_matches_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    entries = [{"message": "connection complete", "number": number} for number in range(3)]
    path.write_text(json.dumps(entries[0]) + "\n")
    log = AccessLog(path)
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries[1:])
    assert log.wait_for(lambda _entry: True) == entries[1]


def test_who_writes_beside_the_log_does_not_put_off_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "LOG_SECONDS", 0.2)
    end = time.monotonic() + LONGEST_SECONDS

    class Beside(AccessLog):
        def _read(self) -> list[dict[str, Any]]:
            assert time.monotonic() < end
            (tmp_path / "other").write_text("a")
            return super()._read()

    path = tmp_path / "agent.log"
    path.touch()
    with pytest.raises(LabError, match="does not tell"):
        Beside(path).wait_for(lambda _entry: True)

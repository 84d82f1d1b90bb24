"""Lines that are written at once: no connection ends because one cannot be written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agent.line_log import LOG, log
from agent.loglines import Format, Levels


def test_line_has_time_message_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log("tunnel closed", pod="shop/cart", peer=None)
    entry = json.loads(capsys.readouterr().err)
    assert entry.pop("time")
    assert entry == {
        "level": "info",
        "scope": "tunnel",
        "message": "tunnel closed",
        "pod": "shop/cart",
        "peer": None,
    }


def test_levels_and_form_are_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "levels", Levels("warning"))
    monkeypatch.setattr(LOG, "form", Format.TEXT)
    log("tunnel closed")
    log("tunnel refused", level="warning", code=7)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.split("\t")[1:] == ["warning", "tunnel", "tunnel refused", "code=7"]


def test_line_that_cannot_be_written_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115  # closing it fails as well
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", full)
        for number in range(1000):
            log("connection complete", number=number)
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_log_without_stderr_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log("connection complete")

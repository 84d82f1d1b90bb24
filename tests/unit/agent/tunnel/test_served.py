"""A pod's limits, and the worker's log: no connection ends because a line cannot be written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from agent.loglines import Format, Levels
from agent.model.bounds import DEFAULT_BOUNDS
from agent.model.pod import LocalPod
from agent.tunnel.buffers import FULL, PARTS
from agent.tunnel.reactor import Reactor
from agent.tunnel.served import LOG, ServedPod, log, refusal
from tests.support.stalled import Stalled
from tests.support.tunnel import CLIENT
from tests.support.wire import buffer_limit


def test_pod_whose_readers_hold_all_they_may_is_refused_and_no_other_pod() -> None:
    full, other = (
        ServedPod(LocalPod(f"uid-{name}", "shop", name, "client", ()), CLIENT, -1, 1)
        for name in ("full", "other")
    )
    with buffer_limit(Reactor(), PARTS << 20):
        stalled, slow = Stalled(full.share), Stalled(other.share)
        slow.keep(1)
        stalled.keep(1 << 20)
        assert refusal(full, DEFAULT_BOUNDS) == FULL
        assert refusal(other, DEFAULT_BOUNDS) == ""
        slow.give_up()
        stalled.give_up()
        assert refusal(full, DEFAULT_BOUNDS) == ""


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

"""The control process's log: forms and levels."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from agent import line_log, logs
from agent.loglines import Format, Levels

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    root, lines = logging.getLogger(), line_log.LOG
    handlers, level = root.handlers[:], root.level
    form, levels = lines.form, lines.levels
    root.handlers.clear()  # pytest's own would be closed
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    lines.form, lines.levels = form, levels


def test_records_are_lines_of_json_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up()
    logging.getLogger("agent.app").info("pod enrolled", extra={"pod": "shop/cart"})
    logging.getLogger("agent.app").debug("nobody wants this")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "info",
        "scope": "agent.app",
        "message": "pod enrolled",
        "pod": "shop/cart",
    }


def test_levels_and_form_change_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(Format.TEXT, Levels("error", (("agent.app", "debug"),)))
    logging.getLogger("agent.app").debug("seen")
    line_log.log("seen at once", scope="agent.app", level="debug")
    logging.getLogger("agent.roster").warning("not seen")
    logs.set_up(Format.TEXT, Levels("off"))
    logging.getLogger("agent.app").critical("not seen either")
    line_log.log("not seen either", scope="agent.app", level="error")
    lines = [line.split("\t")[1:4] for line in capsys.readouterr().err.splitlines()]
    assert lines == [["debug", "agent.app", text] for text in ("seen", "seen at once")]


def test_exceptions_are_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up()
    try:
        raise ValueError("what")
    except ValueError:
        logging.getLogger("agent.app").exception("failed")
    assert "ValueError: what" in json.loads(capsys.readouterr().err)["error"]

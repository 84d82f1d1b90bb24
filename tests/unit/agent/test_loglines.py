"""Lines of the log: their two forms, and which are wanted."""

from __future__ import annotations

import json

import pytest

from agent.errors import ConfigError
from agent.loglines import Format, Levels, build_line, parse_levels

ENTRY: dict[str, object] = {
    "time": "2026-01-01T00:00:00.000+00:00",
    "level": "info",
    "scope": "access",
    "message": "connection complete",
    "src.addr": "10.0.0.1:80",
    "policy": "AuthorizationPolicy shop/a",
    "bytes_sent": 7,
    "error": None,
}


def test_json_has_every_field() -> None:
    assert json.loads(build_line(Format.JSON, ENTRY)) == ENTRY


def test_text_has_the_fields_that_say_something_and_stays_one_line() -> None:
    line = build_line(Format.TEXT, ENTRY | {"reason": "a\nb", "empty": ""})
    head, level, scope, message, fields = line.split("\t")
    assert (head, level, scope, message) == (
        "2026-01-01T00:00:00.000+00:00",
        "info",
        "access",
        "connection complete",
    )
    assert fields == (
        'src.addr=10.0.0.1:80 policy="AuthorizationPolicy shop/a" bytes_sent=7 reason="a\\nb" '
        'empty=""'
    )
    assert "\n" not in line
    assert '"x\\ny"' in build_line(Format.TEXT, ENTRY | {"message": "x\ny"})


@pytest.mark.parametrize(
    ("levels", "scope", "level", "wanted"),
    [
        (Levels(), "agent.app", "info", True),
        (Levels(), "agent.app", "debug", False),
        (Levels("warning"), "access", "info", False),
        (Levels("warning", (("access", "debug"),)), "access", "debug", True),
        (Levels("info", (("agent", "off"),)), "agent.app", "error", False),
        (Levels("info", (("agent", "off"), ("agent.app", "debug"))), "agent.app", "debug", True),
        (Levels("info", (("agent.app", "debug"), ("agent", "off"))), "agent.app", "debug", True),
        (Levels("info", (("agent", "off"),)), "agents", "info", True),
    ],
)
def test_the_nearest_scope_decides(levels: Levels, scope: str, level: str, wanted: bool) -> None:
    assert levels.wants(scope, level) is wanted


def test_levels_are_read_and_change_only_what_they_name() -> None:
    first = parse_levels("warn, access=DEBUG")
    assert first == Levels("warning", (("access", "debug"),))
    assert parse_levels("agent.app=trace", first) == Levels(
        "warning", (("access", "debug"), ("agent.app", "debug"))
    )
    assert str(first) == "warning,access=debug"
    assert parse_levels(str(first)) == first


@pytest.mark.parametrize("text", ["", "loud", "=info", "access=", "info,"])
def test_level_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="the levels are debug, info"):
        parse_levels(text)

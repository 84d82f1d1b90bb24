"""Fields of objects of unknown shape: what is read, and how a wrong one is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from agent.discovery.fields import LABEL_NAME, Field, WrongField, read_created

if TYPE_CHECKING:
    from collections.abc import Callable

BODY = Field({"a": {"b/c": 1, "list": ["x"], "port": 80, "ip": "::1", "csv": "80, 81"}}, "")


def test_paths_name_members_and_items() -> None:
    assert BODY.get("a").get("b/c").path == "a[b/c]"
    (item,) = BODY.get("a").get("list").items()
    assert (item.path, item.text(), item.field_name) == ("a.list[0]", "x", "list[0]")
    assert [name for name, _field in BODY.members()] == ["a"]


def test_absent_fields_have_absent_members_and_defaults() -> None:
    absent = BODY.get("x").get("y")
    assert absent.path == "x.y"
    assert [*absent.items(), *absent.members()] == []
    assert (absent.text("d"), absent.flag(default=True)) == ("d", True)
    assert absent.name(LABEL_NAME, "d") == "d"
    absent.only()


def test_values_are_read() -> None:
    inner = BODY.get("a")
    assert inner.get("port").port() == 80
    assert str(inner.get("ip").address()) == "::1"
    assert inner.get("csv").ports() == {80, 81}
    assert [str(each) for each in Field("10.0.0.1, fd00::/8", "n").networks()] == [
        "10.0.0.1/32",
        "fd00::/8",
    ]
    assert Field(False, "f").flag(default=True) is False
    Field({"a": 1}, "f").only("a", "b")


@pytest.mark.parametrize(
    ("value", "read", "detail"),
    [
        (1, lambda f: f.get("x"), "mapping"),
        (1, lambda f: [*f.items()], "list"),
        (1, lambda f: [*f.members()], "mapping"),
        (1, lambda f: f.text(), "quote it"),
        (None, lambda f: f.text(), "required"),
        ("A_b", lambda f: f.name(LABEL_NAME), "not a valid name"),
        (None, lambda f: f.port(), "required"),
        (0, lambda f: f.port(), "1 to 65535"),
        (True, lambda f: f.port(), "1 to 65535"),
        ("yes", lambda f: f.flag(default=True), "true or false"),
        ("10.0.0.300", lambda f: f.address(), "not an IP address"),
        ("+80", lambda f: f.ports(), "1 to 65535"),
        ("10.0.0.0/33", lambda f: f.networks(), "range"),
    ],
)
def test_wrong_field_is_named(value: object, read: Callable[[Field], object], detail: str) -> None:
    with pytest.raises(WrongField) as caught:
        read(Field(value, "spec.field"))
    assert caught.value.path == "spec.field"
    assert detail in caught.value.detail


def test_unknown_member_is_named() -> None:
    with pytest.raises(WrongField) as caught:
        BODY.only("b")
    assert caught.value.path == "a"
    assert Field(1, "").wrong("x").path == "object"


@pytest.mark.parametrize(
    "written",
    ['"2026-01-01T00:00:00Z"', "2026-01-01T00:00:00Z", "2026-01-01 01:00:00+01:00",
     "2026-01-01T00:00:00"],
)  # fmt: skip
def test_age_may_be_written_without_quotes(written: str) -> None:
    metadata = Field(yaml.safe_load(f"creationTimestamp: {written}"), "metadata")
    assert read_created(metadata) == "2026-01-01T00:00:00Z"
    assert read_created(Field({}, "metadata")) == ""


def test_what_is_excused_is_remembered_of_the_whole_object() -> None:
    body = Field({"a": {"ports": "x", "more": ["80"]}}, "")
    assert body.get("a").get("ports").excuse(Field.ports, frozenset({1})) == {1}
    (item,) = body.get("a").get("more").items()
    assert item.excuse(Field.ports, frozenset({1})) == {80}
    assert [wrong.path for wrong in body.excused] == ["a.ports"]

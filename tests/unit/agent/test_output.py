"""Listings: tables for people, JSON and YAML for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
import pytest
import yaml
from click.testing import CliRunner

from agent.output import Output, emit, output_option, render_table

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS: list[dict[str, object]] = [
    {"name": "ss_pods", "id": 7, "pinned": True, "ports": [80, 443], "note": None},
    {"name": "ss_meta", "id": 1234, "pinned": False, "ports": [], "note": ""},
]
COLUMNS = ("name", "id", "pinned", "ports", "note", "no_such")


def printed(output: Output) -> str:
    @click.command()
    def show() -> None:
        emit(iter(ROWS), COLUMNS, output)

    return CliRunner().invoke(show, catch_exceptions=False).output


@pytest.mark.parametrize(("output", "load"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_programs_get_every_value_as_it_is(output: Output, load: Callable[[str], object]) -> None:
    assert load(printed(output)) == ROWS


def test_table_is_aligned_and_names_its_columns() -> None:
    assert printed("table").splitlines() == [
        "NAME        ID   PINNED   PORTS     NOTE   NO SUCH",
        "ss_pods      7   yes      80, 443   -      -",
        "ss_meta   1234   no       -         -      -",
    ]


def test_table_without_rows_still_names_its_columns() -> None:
    assert render_table([], ("name",)) == ["NAME"]


def test_table_without_rows_says_so_beside_what_scripts_read() -> None:
    @click.command()
    @output_option
    def show(output: Output) -> None:
        emit([], ("name",), output, "no names")

    result = CliRunner().invoke(show)
    assert (result.stdout, result.stderr) == ("NAME\n", "no names\n")
    result = CliRunner().invoke(show, ["-o", "json"])
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_sentences_of_a_list_are_told_apart() -> None:
    row: dict[str, object] = {"notes": ["it is late, and dark", "go home"]}
    assert render_table([row], ("notes",))[1] == "it is late, and dark; go home"


def test_long_value_is_never_cut() -> None:
    text = "x" * 5000
    assert render_table([{"name": text}], ("name",))[1] == text


def test_markup_in_a_value_is_text() -> None:
    assert render_table([{"name": "[red]a[/red]"}], ("name",))[1] == "[red]a[/red]"


def test_option_offers_the_three_forms_and_refuses_another() -> None:
    @click.command()
    @output_option
    def show(output: Output) -> None:
        click.echo(output)

    assert CliRunner().invoke(show).output == "table\n"
    assert CliRunner().invoke(show, ["-o", "yaml"]).output == "yaml\n"
    assert CliRunner().invoke(show, ["-o", "xml"]).exit_code == 2

"""How the report's table takes rows."""

from __future__ import annotations

from tests.drills.report import BEGIN, END, HEAD, Row, merge

ROW = Row("disk full", "all", "go on", "all", 0.25, 0)
OTHER = "| link down | all | cut | all | 1.0 s | 0 |"


def test_rows_take_the_place_of_their_names_and_others_stay() -> None:
    old = "| disk full | refused | cut | refused | 9.0 s | 0 |"
    page = "before\n" + BEGIN + "\n".join((*HEAD, old, OTHER)) + "\n" + END + "after\n"
    table = "\n".join((*HEAD, ROW.line(), OTHER))
    assert merge(page, [ROW]) == "before\n" + BEGIN + table + "\n" + END + "after\n"


def test_a_new_row_is_the_last() -> None:
    page = BEGIN + "\n".join((*HEAD, OTHER)) + "\n" + END
    assert merge(page, [ROW]) == BEGIN + "\n".join((*HEAD, OTHER, ROW.line())) + "\n" + END


def test_an_empty_table_is_filled() -> None:
    assert merge(BEGIN + END, [ROW]) == BEGIN + "\n".join((*HEAD, ROW.line())) + "\n" + END

"""The index of decisions has each page, by its own title."""

from __future__ import annotations

from tests.support.modules import ROOT

DECISIONS = ROOT / "docs/decisions"


def test_index_lists_every_decision_by_its_title() -> None:
    expected = []
    for page in sorted(DECISIONS.glob("[0-9]*.md")):
        number, title = page.read_text().splitlines()[0].removeprefix("# ").split(". ", 1)
        assert int(page.name[:4]) == int(number)
        expected.append(f"{number}. [{title}]({page.name})")
    listed = (DECISIONS / "README.md").read_text().splitlines()
    assert [line for line in listed if "](" in line] == expected

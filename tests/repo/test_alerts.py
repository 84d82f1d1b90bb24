"""Alert rules and dashboard are what Prometheus understands, by its own tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.support.modules import ROOT
from tests.support.queries import DASHBOARD, RULES, dashboard_queries

PROMTOOL = Path(sys.executable).parent / "promtool"  # `make setup` puts it there


def promtool(*arguments: str) -> str:
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_are_right_and_fire_when_they_should() -> None:
    promtool("check", "rules", str(RULES))
    assert "SUCCESS" in promtool("test", "rules", str(RULES.with_name("alerts_test.yaml")))


def test_expressions_of_the_dashboard_are_right(tmp_path: Path) -> None:
    expressions = [expression for expression, _legend in dashboard_queries()]
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, expression in enumerate(expressions)
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(expressions)} rules found" in promtool("check", "rules", str(path))
    assert "$" not in "".join(expressions)


def test_every_panel_has_a_place_of_its_own() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _y in cells) < 24
        taken |= cells


def test_every_alert_says_what_to_look_at() -> None:
    alerts = [rule for group in yaml.safe_load(RULES.read_text())["groups"]
              for rule in group["rules"]]  # fmt: skip
    assert len(alerts) > 10
    for alert in alerts:
        assert alert["alert"].startswith("Sidestep")
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"].keys() == {"summary", "description"}
    guide = (ROOT / "docs/operations.md").read_text()
    assert [alert["alert"] for alert in alerts if alert["alert"] not in guide] == []

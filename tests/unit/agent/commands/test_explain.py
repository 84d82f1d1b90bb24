"""What `sidestep explain` takes for a destination."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from agent.commands import explain as module
from agent.commands.explain import explain

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("destination", "said"),
    [
        ("shop/server", "shop/server has no port"),
        ("shop/server:", "shop/server: has no port"),
        ("10.0.0.1:99999", "port 99999 is not 1 to 65535"),
        ("10.0.0.1:0", "port 0 is not 1 to 65535"),
        ("10.0.0.1:-1", "port -1 is not 1 to 65535"),
        ("10.0.0.1:http", "port 'http' is no number"),
        ("10.0.0.1:\u0665", "port '\u0665' is no number"),
        ("shop/server:8080/tcp", "port '8080/tcp' is no number"),
    ],
)
def test_port_that_is_none_is_an_error_that_says_why(destination: str, said: str) -> None:
    result = CliRunner().invoke(explain, ["client", destination])
    assert result.exit_code == 2
    assert said in result.stderr


def test_brackets_of_addresses_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def ask(_sockets: list[Path], _command: str, **arguments: Any) -> list[Any]:
        asked.update(arguments)
        return []

    monkeypatch.setattr(module, "ask_any", ask)
    result = CliRunner().invoke(explain, ["[fd00::2]", "[fd00::3]:80", "--socket", "agent.sock"])
    assert result.exit_code == 0
    assert asked == {"source": "fd00::2", "destination": "fd00::3", "port": 80}

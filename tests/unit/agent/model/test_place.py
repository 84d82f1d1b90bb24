"""NAMESPACE/NAME: both are there, and nothing else is."""

from __future__ import annotations

import re

import pytest

from agent.errors import ConfigError
from agent.model.place import parse_place


def test_place_has_a_namespace_and_a_name() -> None:
    assert parse_place("sidestep-system/sidestep-ca", "--secret") == (
        "sidestep-system",
        "sidestep-ca",
    )


@pytest.mark.parametrize("text", ["", "name", "/name", "namespace/", "a/b/c"])
def test_anything_else_is_refused_by_the_option(text: str) -> None:
    told = re.escape(f"--secret {text}: must be NAMESPACE/NAME")
    with pytest.raises(ConfigError, match=f"^{told}$"):
        parse_place(text, "--secret")

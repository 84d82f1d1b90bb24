"""Addresses and ports are written as a URL has them."""

from __future__ import annotations

import pytest

from agent.model.endpoint import endpoint, parse_address


def test_address_of_ipv6_has_brackets() -> None:
    assert endpoint("10.0.0.1", 80) == "10.0.0.1:80"
    assert endpoint("fd00::1", 80) == "[fd00::1]:80"


def test_address_is_read_once() -> None:
    assert parse_address("10.0.0.1") is parse_address("10.0.0.1")
    assert str(parse_address("fd00::0:1")) == "fd00::1"
    with pytest.raises(ValueError, match="nobody"):
        parse_address("nobody")

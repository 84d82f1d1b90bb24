"""Addresses and ports are written as a URL has them."""

from __future__ import annotations

from agent.model.endpoint import endpoint


def test_address_of_ipv6_has_brackets() -> None:
    assert endpoint("10.0.0.1", 80) == "10.0.0.1:80"
    assert endpoint("fd00::1", 80) == "[fd00::1]:80"

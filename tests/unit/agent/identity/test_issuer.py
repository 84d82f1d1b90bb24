"""A certificate as a value."""

from __future__ import annotations

from agent.identity.issuer import Certificate
from agent.model.identity import SpiffeId


def test_key_is_in_no_text_of_a_certificate() -> None:
    identity = SpiffeId("cluster.local", "shop", "cart")
    certificate = Certificate(identity, b"chain", b"secret", b"roots", 0, 1)
    assert "secret" not in f"{certificate} {certificate!r}"
    assert "chain" in repr(certificate)

"""Whom a certificate's names prove: one SPIFFE id of our trust domain, or nobody."""

from __future__ import annotations

import pytest

from agent.errors import UntrustedPeer
from agent.identity.verify import peer_identity
from agent.model.identity import SpiffeId

ID = "spiffe://cluster.local/ns/shop/sa/cart"


def test_one_spiffe_id_of_our_trust_domain_is_the_peer() -> None:
    assert peer_identity([("URI", ID)], "cluster.local") == SpiffeId(
        "cluster.local", "shop", "cart"
    )


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "names nothing"),
        ([("DNS", "cart.shop")], "names DNS:cart.shop, not one"),
        ([("URI", ID), ("URI", ID)], "not one SPIFFE id"),
        ([("URI", ID), ("DNS", "cart.shop")], "not one SPIFFE id"),
        ([("URI", "https://cart.shop")], "does not start with spiffe://"),
        ([("URI", ID.replace("cluster.local", "other"))], "not of trust domain cluster.local"),
        ([("URI", ID.replace("cluster.local", "cluster.local.evil"))], "not of trust domain"),
    ],
)
def test_anything_else_is_untrusted_with_the_reason(
    names: list[tuple[str, str]], reason: str
) -> None:
    with pytest.raises(UntrustedPeer, match=reason):
        peer_identity(iter(names), "cluster.local")

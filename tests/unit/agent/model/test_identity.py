"""SPIFFE ids: one text for one identity, and everything else refused with the reason."""

from __future__ import annotations

import pytest

from agent.model.identity import LONGEST, SpiffeId, parse_spiffe_id

TEXT = "spiffe://cluster.local/ns/shop/sa/cart"


def test_text_and_value_are_the_same() -> None:
    identity = SpiffeId("cluster.local", "shop", "cart")
    assert str(identity) == TEXT
    assert parse_spiffe_id(TEXT) == identity


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not start with spiffe://"),
        ("https://cluster.local/ns/shop/sa/cart", "does not start with"),
        ("SPIFFE://cluster.local/ns/shop/sa/cart", "does not start with"),
        ("spiffe://cluster.local", "is not <trust domain>/ns"),
        (TEXT + "/", "is not <trust domain>/ns"),
        (TEXT.replace("/ns/", "/namespace/"), "is not <trust domain>/ns"),
        (TEXT.replace("/sa/", "/SA/"), "is not <trust domain>/ns"),
        ("spiffe:///ns/shop/sa/cart", "wrong trust domain"),
        ("spiffe://Cluster.local/ns/shop/sa/cart", "wrong trust domain"),
        ("spiffe://user@cluster.local/ns/shop/sa/cart", "wrong trust domain"),
        ("spiffe://cluster.local:80/ns/shop/sa/cart", "wrong trust domain"),
        ("spiffe://cluster.local/ns//sa/cart", "wrong namespace"),
        ("spiffe://cluster.local/ns/./sa/cart", "wrong namespace"),
        ("spiffe://cluster.local/ns/shop/sa/..", "wrong service account"),
        ("spiffe://cluster.local/ns/shop/sa/", "wrong service account"),
        (TEXT + "?a=b", "wrong service account"),
        (TEXT + "#a", "wrong service account"),
        (TEXT + "%61", "wrong service account"),
        (TEXT + "\n", "wrong service account"),
        (TEXT + "\N{CYRILLIC SMALL LETTER A}", "wrong service account"),
        (TEXT + "a" * LONGEST, "is longer than"),
    ],
)
def test_anything_else_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_spiffe_id(text)


def test_longest_id_is_accepted() -> None:
    text = TEXT + "a" * (LONGEST - len(TEXT))
    assert str(parse_spiffe_id(text)) == text

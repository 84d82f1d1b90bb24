"""An open connection as listings show it."""

from __future__ import annotations

import pytest

from agent.model.open_connection import OpenConnection


def test_row_names_both_ends_and_is_read_again() -> None:
    connection = OpenConnection(
        namespace="shop",
        pod="cart",
        direction="outbound",
        path="hbone",
        state="open",
        source="10.0.0.1:40000",
        original="10.96.0.1:80",
        destination="10.0.0.2:8080",
        service="stock.shop.svc.cluster.local",
        source_pod="shop/cart",
        destination_pod="shop/stock",
        source_identity="spiffe://td/ns/shop/sa/cart",
        destination_identity="spiffe://td/ns/shop/sa/stock",
        policy=None,
        sent=1,
        received=2,
        age_seconds=3.5,
    )
    row = connection.row()
    assert row["pod"] == "shop/cart"
    assert row["original_destination"] == "10.96.0.1:80"
    assert (row["bytes_sent"], row["bytes_received"], row["age_seconds"]) == (1, 2, 3.5)
    assert (row["source_pod"], row["destination_pod"]) == ("shop/cart", "shop/stock")
    assert OpenConnection.parse(row | {"worker": 5}) == connection
    with pytest.raises(LookupError):
        OpenConnection.parse({"pod": "shop/cart"})

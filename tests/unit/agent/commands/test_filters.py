"""Which rows the filters of listings leave."""

from __future__ import annotations

import click
import pytest

from agent.commands.filters import Filter

ROWS: list[dict[str, object]] = [
    {"node": "east", "pod": "shop/cart"},
    {"node": "west", "pod": "bank/cart"},
    {"node": "east", "source_pod": "shop/cart", "destination_pod": "bank/vault", "pod": None},
    {"node": "east", "policy": "AuthorizationPolicy shop/read", "pods": ["bank/vault"]},
    {"node": "east", "identity": "spiffe://td/ns/shop/sa/cart"},
    {"node": "west", "service": "shop/web"},
    {"node": "west", "namespace": "shop"},
    {"node": "east", "source": "10.0.0.1:4", "pod": None},
    {"service": "mail/smtp", "pods": ["shop/cart"], "nodes": ["east", "west"]},
]


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (Filter(), range(9)),
        (Filter(node="west"), (1, 5, 6, 8)),
        (Filter(pod="cart"), (0, 1, 2, 8)),
        (Filter(pod="cart", namespace="shop"), (0, 2, 8)),
        (Filter(pod="shop/cart"), (0, 2, 8)),
        (Filter(pod="bank/vault"), (2, 3)),
        (Filter(namespace="shop"), (0, 2, 3, 4, 5, 6, 8)),
        (Filter(namespace="shop", node="east"), (0, 2, 3, 4, 8)),
        (Filter(pod="nobody"), ()),
    ],
)
def test_rows_that_are_about_it_are_left(wanted: Filter, left: tuple[int, ...]) -> None:
    assert wanted.apply(ROWS) == [ROWS[number] for number in left]


def test_pod_of_another_namespace_than_the_one_that_is_asked_for_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="is not in namespace bank"):
        Filter(pod="shop/cart", namespace="bank")
    assert Filter(pod="shop/cart", namespace="shop") == Filter(pod="cart", namespace="shop")

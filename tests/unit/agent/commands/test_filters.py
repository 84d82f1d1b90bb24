"""Which rows the filters of listings leave."""

from __future__ import annotations

import click
import pytest

from agent.commands.filters import SHOWN, Filter, Names
from agent.errors import NameUnknown

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


def known() -> Names:
    names = Names()
    names.add([{"pod": "shop/cart", "node": "east"}], ["shop"], ["east"])
    names.add([{"pod": "bank/vault", "node": "west"}], ["bank", "mail"], ["west", "north"])
    return names


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Filter(pod="nope"), "no pod nope is known"),
        (Filter(pod="shop/vault"), "no pod shop/vault is known"),
        (Filter(pod="bank/cart"), "closest: bank/vault, shop/cart"),
        (Filter(pod="sohp/cart"), "no namespace sohp is known"),
        (Filter(namespace="nope"), "no namespace nope is known"),
        (Filter(namespace="shop", node="esat"), "no node esat is known; closest: "),
    ],
)
def test_name_that_is_not_known_is_an_error_and_not_an_empty_listing(
    wanted: Filter, said: str
) -> None:
    with pytest.raises(NameUnknown, match=said):
        wanted.check([], known)


@pytest.mark.parametrize(
    "wanted",
    [
        Filter(pod="cart"),
        Filter(pod="shop/cart", node="west"),
        Filter(namespace="mail"),
        Filter(node="north"),
        Filter(),
    ],
)
def test_what_is_known_may_have_nothing_to_show(wanted: Filter) -> None:
    wanted.check([], known)


def test_nobody_is_asked_for_names_when_there_is_something_to_show() -> None:
    Filter(pod="gone").check([{"pod": "shop/gone"}], lambda: pytest.fail("asked"))


def test_of_many_names_the_closest_are_said() -> None:
    names = Names()
    names.add([{"pod": f"shop/pod-{number}"} for number in range(1000)], ["shop"], [])
    with pytest.raises(NameUnknown) as error:
        Filter(pod="shop/pod-5000").check([], lambda: names)
    assert str(error.value).count("shop/pod-") == SHOWN + 1
    assert "shop/pod-500," in str(error.value)

"""Items by scope: those that cover a pod, and nothing left of those that were dropped."""

from __future__ import annotations

from agent.model.policy import Labels, Scope
from agent.state.selection import Selection

WEB: Labels = frozenset({("app", "web")})
WEB_1: Labels = WEB | {("tier", "1")}


def test_items_of_covering_scopes_are_found() -> None:
    selection: Selection[list[str]] = Selection(list)
    scopes = [Scope(), Scope("shop"), Scope("shop", WEB), Scope("shop", WEB_1), Scope("", WEB)]
    scopes += [Scope("other"), Scope("shop", frozenset({("app", "db")}))]
    for scope in scopes:
        selection.at(scope).append(str(scope))
        assert selection.at(scope) == [str(scope)]  # the same item again
    for labels in (frozenset(), WEB, WEB_1, frozenset({("app", "db")})):
        found = sorted(item[0] for item in selection.covering("shop", labels))
        assert found == sorted(str(scope) for scope in scopes if scope.covers("shop", labels))


def test_dropped_scopes_are_found_no_more_and_may_come_again() -> None:
    selection: Selection[list[str]] = Selection(list)
    scopes = [Scope("shop"), Scope("shop", WEB), Scope("shop", WEB_1)]
    for _ in range(2):
        for scope in scopes:
            selection.at(scope).append("x")
        assert len(selection.covering("shop", WEB_1)) == 3
        for scope in scopes:
            selection.drop(scope)
        assert selection.covering("shop", WEB_1) == []


def test_selectors_with_a_common_label_are_told_apart_by_their_own() -> None:
    selection: Selection[list[str]] = Selection(list)
    for number in range(50):
        selection.at(Scope("shop", frozenset({("a", "common"), ("b", str(number))})))
    filed = selection._by_label["shop"]
    assert max(len(items) for items in filed.values()) == 1


def test_selectors_that_share_a_label_do_not_disturb_each_other() -> None:
    selection: Selection[list[str]] = Selection(list)
    label, other = ("a", "1"), ("b", "1")
    scopes = [Scope("shop", frozenset(pairs)) for pairs in ([label], [other], [label, other])]
    for scope in scopes:
        selection.at(scope).append(str(scope))
    assert selection.covering("shop", frozenset([label])) == [[str(scopes[0])]]
    selection.drop(scopes[0])
    assert selection.covering("shop", frozenset([label])) == []
    assert len(selection.covering("shop", frozenset([label, other]))) == 2

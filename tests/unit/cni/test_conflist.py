"""Our entry in network configurations: where it goes, and that it leaves without a trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.conflist import (
    ConflistError,
    Delete,
    Write,
    derive,
    find_primary,
    has_entry,
    insert,
    plan_install,
    plan_uninstall,
    remove,
)

ENTRY: dict[str, object] = {"type": "sidestep", "agentSocket": "/run/sidestep/cni.sock"}
OTHER = {"type": "sidestep", "agentSocket": "/elsewhere"}
BRIDGE = {"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local"}}
PRETTY = """{
   "name": "pods", "cniVersion": "0.3.1",
   "plugins": [
      {
         "type": "calico", "log_level": "info" , "escaped": "\\u0070lugins\\"]"
      },
      {"type":"portmap","capabilities":{"portMappings":true}}
   ],
   "after": [1, 2]
}
"""
CONF = '{"cniVersion": "0.4.0", "name": "pods", "type": "bridge", "bridge": "cni0"}\n'


def network(*plugins: object, **more: Any) -> str:
    return json.dumps({"name": "pods", "cniVersion": "1.0.0"} | more | {"plugins": list(plugins)})


def plugins(text: str) -> list[Any]:
    found: list[Any] = json.loads(text)["plugins"]
    return found


def test_entry_comes_last_on_a_line_of_its_own_and_nothing_else_changes() -> None:
    text = insert(PRETTY, ENTRY)
    before = json.loads(PRETTY)
    assert json.loads(text) == before | {"plugins": [*before["plugins"], ENTRY]}
    added = f",\n      {json.dumps(ENTRY)}"
    assert text.replace(added, "") == PRETTY
    assert remove(text) == PRETTY


def test_entry_stays_on_the_line_of_a_list_in_one_line() -> None:
    text = insert(network(BRIDGE), ENTRY)
    assert "\n" not in text
    assert plugins(text) == [BRIDGE, ENTRY]


def test_entry_that_is_as_it_should_be_stays_also_before_others() -> None:
    for text in (network(BRIDGE, ENTRY), network(BRIDGE, ENTRY, {"type": "portmap"})):
        assert insert(text, ENTRY) == text


@pytest.mark.parametrize(
    "there",
    [[BRIDGE, OTHER], [ENTRY, BRIDGE], [OTHER, BRIDGE, ENTRY], [BRIDGE, ENTRY, ENTRY]],
)
def test_entry_of_before_is_replaced(there: list[object]) -> None:
    assert plugins(insert(network(*there), ENTRY)) == [BRIDGE, ENTRY]
    assert plugins(remove(network(*there))) == [BRIDGE]


def test_of_several_lists_of_plugins_the_last_counts() -> None:
    text = f'{{"name": "pods", "plugins": [1], "plugins": [{json.dumps(BRIDGE)}]}}'
    assert plugins(insert(text, ENTRY)) == [BRIDGE, ENTRY]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(JSON, min_size=1, max_size=4),
    st.dictionaries(st.text(max_size=8), JSON, max_size=3),
    st.sampled_from([None, 0, 1, 3, "\t"]),
    st.booleans(),
)
def test_what_was_put_in_comes_out_to_the_byte(
    others: list[object], more: dict[str, Any], indent: int | str | None, is_first: bool
) -> None:
    items = {"plugins": others, "name": "pods"}
    found = items | more | items if is_first else more | items
    text = json.dumps(found, indent=indent, ensure_ascii=False)
    changed = insert(text, ENTRY)
    assert plugins(changed) == [*others, ENTRY]
    assert remove(changed) == text
    assert insert(changed, ENTRY) == changed


def test_list_is_derived_of_a_single_plugin() -> None:
    text = derive(CONF, ENTRY)
    assert json.loads(text) == {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [json.loads(CONF), ENTRY],
    }
    unversioned = derive('{"name": "pods", "type": "bridge"}', ENTRY)
    assert json.loads(unversioned)["cniVersion"] == "0.3.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no name of a network"),
        ('{"name": 1}', "no name of a network"),
        ('{"name": "pods"}', "no list of plugins"),
        ('{"name": "pods", "plugins": []}', "list of plugins is empty"),
        (network(ENTRY), "no plugin but ours"),
    ],
)
def test_file_that_is_no_network_says_why(text: str, message: str) -> None:
    with pytest.raises(ConflistError, match=message):
        remove(text)


def test_primary_is_the_first_that_a_runtime_could_use() -> None:
    files = {
        "00-notes.txt": b"{}",
        "01-broken.conflist": b"{",
        "02-latin.conf": '{"name": "é", "type": "x"}'.encode("latin-1"),
        "03-untyped.conf": b'{"name": "pods"}',
        "04-ours.conflist": network(ENTRY).encode(),
        "09-single.by-sidestep.conflist": network(BRIDGE, ENTRY).encode(),
        "10-pods.conflist": PRETTY.encode(),
        "20-other.conf": CONF.encode(),
    }
    assert find_primary(files) == "10-pods.conflist"
    assert find_primary({}) is None


def test_installing_changes_the_primary_and_cleans_the_others() -> None:
    entry = network(BRIDGE, ENTRY).encode()
    files = {
        "05-new.conflist": PRETTY.encode(),
        "10-old.conflist": entry,
        "20-x.by-sidestep.conflist": entry,
        "30-broken.conflist": b"\xff",
        "40-clean.conflist": network(BRIDGE).encode(),
    }
    assert plan_install(files, ENTRY) == [
        Write("05-new.conflist", insert(PRETTY, ENTRY).encode()),
        Write("10-old.conflist", network(BRIDGE).encode()),
        Delete("20-x.by-sidestep.conflist"),
    ]
    assert plan_install({}, ENTRY) == []


@pytest.mark.parametrize("name", ["10-pods.conf", "10-pods.json"])
def test_single_plugin_gets_a_list_beside_it_that_comes_first(name: str) -> None:
    files = {name: CONF.encode()}
    (change,) = plan_install(files, ENTRY)
    assert isinstance(change, Write)
    assert sorted([change.name, name])[0] == change.name
    installed = files | {change.name: change.content}
    assert plan_install(installed, ENTRY) == []
    assert has_entry(installed)
    assert plan_uninstall(installed) == [Delete(change.name)]
    assert not has_entry(files)
    # Its owner has removed the network.
    assert plan_install({change.name: change.content}, ENTRY) == [Delete(change.name)]


def test_uninstalling_leaves_what_others_changed_meanwhile() -> None:
    changed = insert(PRETTY, ENTRY).replace('"info"', '"debug"')
    (change,) = plan_uninstall({"10-pods.conflist": changed.encode()})
    expected = PRETTY.replace('"info"', '"debug"').encode()
    assert change == Write("10-pods.conflist", expected)

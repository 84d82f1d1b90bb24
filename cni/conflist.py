"""Our entry in the network configurations of a node: where it goes, and how it leaves. Pure.

    10-calico.conflist   {"plugins": [A, B]}     -> [A, B, ours], and nothing else is touched
    10-bridge.conf       {"type": "bridge", ...} -> 10-bridge.by-sidestep.conflist beside it, which
                                                    has the same plugin and ours, and comes first

Of a list the bytes of our entry alone are put in and taken out, so what remains is the file as its
owner wrote it, also if he changed it in between. A single plugin cannot be chained, so a list of
our own is derived from it, and its file stays as it is.

The runtime uses the first file by name that ends in .conf, .conflist or .json; so do we. Files of
which no runtime could make anything are passed over.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # not in typeshed
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PLUGIN_TYPE = "sidestep"
SUFFIXES = (".conf", ".conflist", ".json")
# "b" sorts before the "c" and "j" of the endings.
DERIVED = f".by-{PLUGIN_TYPE}.conflist"
NO_LIST_SINCE = "0.3.1"  # the version that a .conf without one is given

_SPACE = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()


class ConflistError(Exception):
    """A file is no network configuration; the message says why."""


@dataclass(frozen=True, slots=True)
class Write:
    """Give a file this content."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a file, which is ours."""

    name: str


Change = Write | Delete


def find_primary(files: Mapping[str, bytes]) -> str | None:
    """Return the file that the runtime uses, without regard to those that we derived."""
    for name in sorted(files):
        if not name.endswith(SUFFIXES) or name.endswith(DERIVED):
            continue
        try:
            _check(name, files[name])
        except ConflistError:
            continue
        return name
    return None


def plan_install(files: Mapping[str, bytes], entry: Mapping[str, object]) -> list[Change]:
    """List what to change so that the primary network, and no other, has our entry last.

    Without one, what was derived from it has to go: the runtime would go on with it.
    """
    primary = find_primary(files)
    if primary is None:
        return plan_uninstall(files)
    changes: list[Change] = []
    wanted = {}
    if primary.endswith(".conflist"):
        wanted[primary] = insert(files[primary].decode(), entry).encode()
    else:
        name = primary.rpartition(".")[0] + DERIVED
        wanted[name] = derive(files[primary].decode(), entry).encode()
    others = {name: content for name, content in files.items() if name not in wanted}
    for name, content in wanted.items():
        if files.get(name) != content:
            changes.append(Write(name, content))
    return changes + plan_uninstall(others)


def plan_uninstall(files: Mapping[str, bytes]) -> list[Change]:
    """List what to change so that no network has our entry."""
    changes: list[Change] = []
    for name, content in sorted(files.items()):
        if name.endswith(DERIVED):
            changes.append(Delete(name))
        elif name.endswith(".conflist"):
            try:
                without = remove(content.decode()).encode()
            except (ConflistError, UnicodeDecodeError):
                continue
            if without != content:
                changes.append(Write(name, without))
    return changes


def insert(text: str, entry: Mapping[str, object]) -> str:
    """Put our entry after the other plugins of a list (ConflistError).

    One that is there as it should be stays where it is, also if somebody came after it.
    """
    plugins = [json.loads(text[start:end]) for start, end in _plugins(text)]
    if [plugin for plugin in plugins if _is_ours(plugin)] == [entry] and plugins[0] != entry:
        return text
    text = remove(text)
    start, end = _plugins(text)[-1]
    line_start = text.rfind("\n", 0, start) + 1
    indent = text[line_start:start]
    # In the style of the entry before ours: a line of its own, or the same line.
    separator = f",\n{indent}" if line_start and not indent.strip() else ", "
    return text[:end] + separator + json.dumps(entry) + text[end:]


def remove(text: str) -> str:
    """Take our entry out of a list, and the comma before it (ConflistError)."""
    spans = _plugins(text)
    ours = [_is_ours(json.loads(text[start:end])) for start, end in spans]
    if all(ours):
        raise ConflistError("there is no plugin but ours")
    first_other = ours.index(False)
    # From the back, so that positions before stay right.
    for index in range(len(spans) - 1, first_other, -1):
        if ours[index]:
            text = text[: spans[index - 1][1]] + text[spans[index][1] :]
    return text[: spans[0][0]] + text[spans[first_other][0] :]


def derive(text: str, entry: Mapping[str, object]) -> str:
    """Make a list of a single plugin and ours, of the same network (ConflistError)."""
    single = _load(text)
    head = {"cniVersion": single.get("cniVersion") or NO_LIST_SINCE, "name": single["name"]}
    opening = json.dumps(head, indent=2).removesuffix("\n}")
    return f'{opening},\n  "plugins": [\n{text.strip()},\n{json.dumps(entry)}\n  ]\n}}\n'


def has_entry(files: Mapping[str, bytes]) -> bool:
    """Say whether some network has our entry."""
    return bool(plan_uninstall(files))


def _check(name: str, content: bytes) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConflistError(f"it is not UTF-8: {error}") from error
    found = _load(text)
    if name.endswith(".conflist"):
        remove(text)
    elif not isinstance(found.get("type"), str):
        raise ConflistError("it has no type of plugin")


def _load(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConflistError(f"it is not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ConflistError("it has no name of a network")
    return found


def _is_ours(plugin: object) -> bool:
    return isinstance(plugin, dict) and plugin.get("type") == PLUGIN_TYPE


def _plugins(text: str) -> list[tuple[int, int]]:
    """Return where each item of the member `plugins` begins and ends."""
    if not isinstance(_load(text).get("plugins"), list):
        raise ConflistError("it has no list of plugins")
    # Of several members of one name the last counts, as for the runtime.
    start = [at for key, at in _members(text) if key == "plugins"][-1]
    spans = list(_items(text, start))
    if not spans:
        raise ConflistError("its list of plugins is empty")
    return spans


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _members(text: str) -> Iterator[tuple[str, int]]:
    """Yield each name of an object that is valid, and where its value begins."""
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] == '"':
        key, at = scanstring(text, at + 1)
        start = _skip(text, _skip(text, at) + 1)
        yield key, start
        _value, at = _decoder.raw_decode(text, start)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _items(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield where each item of a list that is valid begins and ends."""
    at = _skip(text, start + 1)
    while text[at] != "]":
        _value, end = _decoder.raw_decode(text, at)
        yield at, end
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)

"""The same filters for every listing: --pod, --namespace and --node.

A row is about the pods that its columns name (`pod`, `workload`, `source_pod`, `destination_pod`,
`pods`: NAMESPACE/NAME), or about a namespace or identity that it names; one that names none is left
out where a filter asks for some. Its nodes are those of the column `node` or `nodes`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from agent.errors import NameUnknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from agent.output import Row

POD_COLUMNS = ("pod", "workload", "source", "destination", "source_pod", "destination_pod", "pods")
NAMED_COLUMNS = ("service", "policy")  # [KIND ]NAMESPACE/NAME
SHOWN = 8  # names in place of one that is not known
NEVER_KNOWN = {
    "pod": " (one on its node's network, or that has ended, never is)",
    "namespace": " (one without pods, services and policies never is)",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows a person wants to see; None is every one."""

    pod: str | None = None
    namespace: str | None = None
    node: str | None = None

    def __post_init__(self) -> None:
        if self.pod is not None and "/" in self.pod:
            space, _, name = self.pod.partition("/")
            if self.namespace not in (None, space):
                raise click.BadParameter(
                    f"{self.pod} is not in namespace {self.namespace}", param_hint="--pod"
                )
            object.__setattr__(self, "pod", name)
            object.__setattr__(self, "namespace", space)

    def passes(self, row: Row) -> bool:
        """Say whether a row is to be shown."""
        if self.node is not None and self.node not in _nodes(row):
            return False
        if self.pod is None and self.namespace is None:
            return True
        pods = set(_pods(row))
        if self.pod is not None:
            return any(name == self.pod and self.namespace in (None, space) for space, name in pods)
        return self.namespace in {space for space, _name in pods} | set(_namespaces(row))

    def apply(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows that are to be shown."""
        return [row for row in rows if self.passes(row)]

    def check(self, left: list[Row], ask_names: Callable[[], Names]) -> None:
        """Tell a name that is mistyped from one that has nothing to show, where no row is left.

        Raises:
            NameUnknown: what is asked for is not among the names.
        """
        if left or self == Filter():
            return
        names = ask_names()
        if self.node not in (None, *names.nodes):
            raise NameUnknown(_unknown("node", self.node, names.nodes))
        if self.namespace not in (None, *names.namespaces):
            raise NameUnknown(_unknown("namespace", self.namespace, names.namespaces))
        if self.pod is not None and not Filter(self.pod, self.namespace).apply(names.pods.values()):
            wanted = self.pod if self.namespace is None else f"{self.namespace}/{self.pod}"
            raise NameUnknown(_unknown("pod", wanted, names.pods))


@dataclass(slots=True)
class Names:
    """What is known to be there, whether or not a listing has something of it.

    Pods are rows with `pod`, `node` and, from agents, `refusal`: why one does not want the mesh.
    """

    pods: dict[str, Row] = field(default_factory=dict)
    namespaces: set[str] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)

    def add(self, pods: Iterable[Row], namespaces: Iterable[str], nodes: Iterable[str]) -> None:
        """Take what one more place knows."""
        self.pods |= {str(row["pod"]): row for row in pods}
        self.namespaces |= {*namespaces}
        self.nodes |= {*nodes}


def _unknown(kind: str, wanted: str | None, known: Iterable[str]) -> str:
    text = f"no {kind} {wanted} is known{NEVER_KNOWN.get(kind, '')}"
    closest = difflib.get_close_matches(str(wanted), sorted(known), n=SHOWN, cutoff=0)
    return f"{text}; closest: {', '.join(closest)}" if closest else text


def _nodes(row: Row) -> list[object]:
    several = row.get("nodes")
    return several if isinstance(several, list) else [row.get("node")]


def _pods(row: Row) -> Iterator[tuple[str, str]]:
    for column in POD_COLUMNS:
        value = row.get(column)
        for text in value if isinstance(value, list) else [value]:
            space, separator, name = str(text).partition("/")
            if separator:
                yield space, name


def _namespaces(row: Row) -> Iterator[str]:
    if row.get("namespace"):
        yield str(row["namespace"])
    for column in NAMED_COLUMNS:
        space, separator, _name = str(row.get(column) or "").rpartition(" ")[2].partition("/")
        if separator:
            yield space
    identity = str(row.get("identity") or "").split("/")
    if "ns" in identity[:-1]:
        yield identity[identity.index("ns") + 1]


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a Filter, passed to it as `wanted`."""

    @wraps(command)
    def filtered(*args: Any, pod: str | None, namespace: str | None, node: str | None,
                 **kwargs: Any) -> Any:  # fmt: skip
        return command(*args, wanted=Filter(pod, namespace, node), **kwargs)

    options = (
        click.option("--pod", metavar="[NAMESPACE/]NAME", help="Show only what is about this pod."),
        click.option("-n", "--namespace", help="Show only what is about this namespace."),
        click.option("--node", help="Show only what is on this node."),
    )
    wrapped: Callable[..., Any] = filtered
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped

"""`sidestep connections`: which connections are open, who they are, and who carries them."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import click

from agent.commands.asking import agent_options, ask_each, ask_names, chosen_sockets
from agent.commands.examples import examples
from agent.commands.filters import Filter, filter_options
from agent.output import Output, Row, emit, output_option

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = (
    "node",
    "direction",
    "from",
    "to",
    "path",
    "bytes_sent",
    "bytes_received",
    "age",
    "worker",
)
PATHS = ("hbone", "direct", "plaintext", "tcp")


@click.command(
    epilog=examples(
        "sidestep connections",
        "sidestep connections --pod shop/client --path hbone",
        "sidestep connections -n shop -o json",
    )
)
@agent_options
@filter_options
@click.option("--path", type=click.Choice(PATHS), help="Show only what takes this path.")
@output_option
def connections(
    socket_path: Path | None,
    lab: str | None,
    run_dir: Path,
    wanted: Filter,
    path: str | None,
    output: Output,
) -> None:
    """List the open connections of the pods of this node: path, bytes, age and worker.

    A connection between two pods of one node is there once for each end that passes an agent, and
    once if the kernel joins them directly. JSON and YAML have both identities, the destination that
    was asked for, service and policy. Sent are the client's bytes. Worker is a process id; nobody
    carries a direct connection.
    """
    sockets = chosen_sockets(socket_path, lab, run_dir)
    about = {"namespace": wanted.namespace, "pod": wanted.pod}
    answers, code = ask_each(sockets, "connections", **about)
    rows: list[Row] = Filter(node=wanted.node).apply(row for answer in answers for row in answer)
    wanted.check(rows, lambda: ask_names(sockets))
    rows = [row for row in rows if path in (None, row["path"])]
    rows.sort(key=itemgetter("node", "pod", "direction", "source"))
    if output == "table":
        rows = [row | _shown(row) for row in rows]
    emit(rows, COLUMNS, output, "no connections")
    click.get_current_context().exit(code)


def _shown(row: Row) -> Row:
    return {
        "from": _end(row["source_pod"], row["source"]),
        "to": _end(row["destination_pod"], row["destination"]),
        "age": _age(row["age_seconds"]),
    }


def _end(pod: object, address: object) -> str:
    if not pod:
        return str(address)
    host, separator, port = str(address).rpartition(":")
    # Of a client whose connection came by a tunnel the port is not known.
    has_port = separator and (":" not in host or host.endswith("]"))
    return f"{pod}:{port}" if has_port else str(pod)


def _age(seconds: object) -> str:
    assert isinstance(seconds, (int, float))
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"

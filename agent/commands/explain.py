"""`sidestep explain`: why one connection goes where it goes, and may or may not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from agent.commands.asking import agent_options, ask_any, chosen_sockets
from agent.commands.examples import examples
from agent.output import Output, emit, output_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COLUMNS = ("source", "destination", "path", "verdict", "decided_by")


@click.command(
    epilog=examples(
        "sidestep explain shop/client shop/server:8080",
        "sidestep explain shop/client 10.96.0.10:80",
        "sidestep explain 192.0.2.7 service:shop/server:80 -o json",
    )
)
@click.argument("source")
@click.argument("destination", metavar="DESTINATION:PORT")
@agent_options
@output_option
def explain(
    source: str,
    destination: str,
    socket_path: Path | None,
    lab: str | None,
    run_dir: Path,
    output: Output,
) -> None:
    """Explain a connection: its path, the verdict, who decides, and what would change it.

    SOURCE is a pod ([NAMESPACE/]NAME) or an address; DESTINATION also a service. Where a pod and a
    service share a name, service:NAME means the service.

    The path is tunnel (which connections, logs and metrics call hbone), direct, plaintext,
    passthrough (tcp there: nobody judges it), or denied.
    """
    name, port = _parse_destination(destination)
    arguments = {"source": source.strip("[]"), "destination": name, "port": port}
    rows = ask_any(chosen_sockets(socket_path, lab, run_dir), "explain", **arguments)
    emit(rows, COLUMNS, output)
    if output == "table":
        for row in rows:
            click.echo()
            for line in _details(row):
                click.echo(line)


def _parse_destination(text: str) -> tuple[str, int]:
    name, separator, port = text.rpartition(":")
    if not separator or not port:
        problem = f"{text} has no port"
    elif not re.fullmatch("-?[0-9]+", port, re.ASCII):
        problem = f"port {port!r} is no number"
    elif not 0 < int(port) < 65536:
        problem = f"port {port} is not 1 to 65535"
    else:
        return name.strip("[]"), int(port)
    raise click.BadParameter(problem, param_hint="DESTINATION:PORT")


def _whose(identity: str | None, row: dict[str, Any]) -> str:
    if identity is None:
        return "without an identity"
    return identity if row["identities_proved"] else f"{identity}, not proved on this path"


def _details(row: dict[str, Any]) -> Sequence[str]:
    lines = [f"{row['source']} -> {row['destination']}: {row['path']}"]
    shown = (
        ("why this path", [row["reason"]]),
        ("verdict", [row["explained"]] if row["explained"] else ["nobody judges it"]),
        ("source is", [_whose(row["source_identity"], row)]),
        ("destination is", [_whose(row["destination_identity"], row)]),
        ("dry run", [row["dry_run"]] if row["dry_run"] else []),
        ("to change it", row["to_change"]),
        ("warning", row["warnings"]),
    )
    lines += [f"  {label + ':':16}{text}" for label, texts in shown for text in texts]
    return lines

"""`sidestep certs`: the certificates of this machine's agents, from their admin sockets."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import click

from agent.errors import ConfigError
from agent.output import Output, emit, output_option

RUN = Path("/run/sidestep")
ANSWER_SECONDS = 5.0
COLUMNS = (
    "identity", "state", "serial", "not_before", "not_after", "next_request", "roots",
    "last_failure",
)  # fmt: skip


def find_sockets(run_directory: Path) -> list[Path]:
    """List the admin sockets of the node's agent, or of the agents of its labs."""
    own = run_directory / "agent.sock"
    return [own] if own.exists() else sorted(run_directory.glob("lab/*/*/agent.sock"))


def read_state(path: Path) -> dict[str, object]:
    """Ask one agent (ConfigError if it does not answer)."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(ANSWER_SECONDS)
            channel.connect(str(path))
            channel.sendall(b'{"command": "state"}\n')
            with channel.makefile("rb") as lines:
                state = json.loads(lines.readline())
    except (OSError, ValueError) as error:
        raise ConfigError(f"no agent answers on {path}: {error}") from error
    return state if isinstance(state, dict) else {}


@click.command()
@click.option(
    "--run-dir", type=click.Path(path_type=Path, file_okay=False), default=RUN, show_default=True,
    help="Run directory of the agent; without one there, the labs below it.",
)  # fmt: skip
@output_option
def certs(run_dir: Path, output: Output) -> None:
    """Show each identity's certificate: chain, serial, validity, next renewal, last failure."""
    sockets = find_sockets(run_dir)
    if not sockets:
        raise ConfigError(f"no agent runs here: there is no {run_dir}/agent.sock")
    rows = []
    for path in sockets:
        state = read_state(path)
        identity = state.get("identity")
        if not isinstance(identity, dict):
            raise ConfigError(f"the agent on {path} does not tell of certificates")
        roots = identity["roots"]
        rows += [
            {"node": state.get("node")}
            | row
            | {"roots": [root["serial"] for root in roots] if output == "table" else roots}
            for row in identity["certificates"]
        ]
    columns = COLUMNS if len(sockets) == 1 else ("node", *COLUMNS)
    emit(rows, columns, output)

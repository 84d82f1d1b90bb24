"""Ask an agent at its socket: the client's end of `agent.admin`, without an event loop."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from agent.errors import AgentUnreachable, RequestRefused

if TYPE_CHECKING:
    from pathlib import Path

ANSWER_SECONDS = 30.0  # a node with hundreds of pods takes a while to be looked at


def ask(path: Path, command: str, **arguments: Any) -> Any:
    """Ask the agent behind a socket, and return its answer.

    Raises:
        AgentUnreachable: nobody answers there.
        RequestRefused: the agent cannot answer this.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(path))
            request = {"command": command, "arguments": arguments}
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("r") as lines:
                answer = json.loads(lines.readline())
    except PermissionError as error:
        raise AgentUnreachable(f"the agent at {path} answers to root only: be root") from error
    except TimeoutError as error:
        raise AgentUnreachable(f"the agent at {path} does not answer in time") from error
    except (OSError, ValueError) as error:
        raise AgentUnreachable(f"no agent answers at {path}: {error}") from error
    if isinstance(answer, dict) and "error" in answer:
        raise RequestRefused(str(answer["error"]))
    return answer

"""Call the CA, in a process of its own that ends when it has nothing to do.

gRPC is 12 MiB of code and several of data, and an agent asks for certificates twice a day. So the
agent runs `python -m agent.identity.caller` while there are calls, as it runs the compiler while
there is something to compile. No key comes here: requests carry a public key and a token.

On stdin and stdout, each message after its length (4 bytes, big endian), pickled, since both ends
are one installation:

    (number, Target, token, request)  ->  (number, status name or "", answer or details)

It ends with its stdin, when the calls in flight are answered.
"""

from __future__ import annotations

import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from agent.identity import wire

if TYPE_CHECKING:
    import grpc

LENGTH_BYTES = 4
CALLS_AT_ONCE = 8
CALL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """Which CA: its address, the name in its certificate ("": the address's), trusted roots."""

    address: str
    server_name: str
    roots: bytes


def build_message(message: object) -> bytes:
    """Return a message with its length before it."""
    packed = pickle.dumps(message)
    return len(packed).to_bytes(LENGTH_BYTES, "big") + packed


def _open(target: Target) -> grpc.Channel:
    import grpc  # heavy, and only ever in this process

    options: list[tuple[str, str | int]] = [
        # How often is asked again is decided by the agent; gRPC must not wait longer than that.
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if target.server_name:
        options.append(("grpc.ssl_target_name_override", target.server_name))
    credentials = grpc.ssl_channel_credentials(target.roots)
    return grpc.secure_channel(target.address, credentials, options)


def _call(channel: grpc.Channel, token: str, request: bytes) -> tuple[str, bytes | str]:
    import grpc

    method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(wire.METHOD)
    metadata = (("authorization", f"Bearer {token}"),)
    try:
        return "", method(request, timeout=CALL_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        return error.code().name, str(error.details())


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    channels: dict[Target, grpc.Channel] = {}
    writing = threading.Lock()

    def answer(number: int, target: Target, token: str, request: bytes) -> None:
        status, body = _call(channels[target], token, request)
        with writing:
            answers.write(build_message((number, status, body)))
            answers.flush()

    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        while head := requests.read(LENGTH_BYTES):
            message = pickle.loads(requests.read(int.from_bytes(head, "big")))
            target = message[1]
            if target not in channels:
                channels[target] = _open(target)
            pool.submit(answer, *message)


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)

"""The promise for large meshes: 10,000 policies of 10 rules, judged and pushed in time.

Shapes of policies that differ in what tells rules apart. `pytest -s` prints the numbers.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from agent.enforcement import Enforcement
from agent.model.condition import Attribute, Connection, Term, network_set, port_set, text_set
from agent.model.identity import SpiffeId
from agent.model.policy import Action, Clause, Policy, PolicyKey, Rule, Scope
from agent.state.rulebook import Rulebook
from agent.state.store import Snapshot
from agent.tunnel import messages

if TYPE_CHECKING:
    from collections.abc import Callable

POLICIES, RULES = 10_000, 10
VERDICT_SECONDS = 100e-6
PUSH_SECONDS = 1.0
Terms = tuple[Term, ...]


def principal(text: str) -> Term:
    return Term(Attribute.PRINCIPAL, text_set([text]))


def to_port(port: int) -> Term:
    return Term(Attribute.DESTINATION_PORT, port_set([port]))


def from_network(text: str) -> Term:
    return Term(Attribute.SOURCE_ADDRESS, network_set([ip_network(text)]))


SHAPES: dict[str, Callable[[int, int], Terms]] = {
    "a principal each": lambda p, r: (principal(f"td/ns/n{p}/sa/s{r}"), to_port(80)),
    "one principal, a port each": lambda p, r: (
        principal("td/ns/gate/sa/s"),
        to_port((p * RULES + r) % 60000 + 1),
    ),
    "principals by ports": lambda p, r: (
        principal(f"td/ns/n{p % 1000}/sa/s"),
        to_port(p // 1000 * RULES + r + 1),
    ),
    "prefixes": lambda p, r: (principal(f"td/ns/n{p}-{r}/*"), to_port(80)),
    "address ranges": lambda p, r: (
        from_network(f"10.{p % 200}.{p // 200}.{r * 16}/28"),
        to_port(80),
    ),
    "negations": lambda p, r: (
        Term(Attribute.NAMESPACE, text_set(["gate", f"n{p % 50}"]), is_negated=True),
        to_port(r + 1),
    ),
}  # fmt: skip


def build(shape: str, action: Action, selects: bool = False) -> list[Policy]:
    make = SHAPES[shape]
    return [
        Policy(
            PolicyKey("shop", f"p{number:05}", "AuthorizationPolicy"),
            action,
            Scope("shop", frozenset({("app", f"a{number}"), ("team", "t")} if selects else ())),
            tuple(
                Rule(
                    position,
                    tuple(
                        Clause(field, ((term,),))
                        for field, term in zip(("from", "to"), make(number, position), strict=True)
                    ),
                )
                for position in range(RULES)
            ),
        )
        for number in range(POLICIES)
    ]


CONNECTIONS = [
    Connection(ip_address("10.9.9.9"), identity, ip_address("10.0.0.1"), port)
    for identity in (
        None,
        *(SpiffeId("td", namespace, "s") for namespace in ("gate", "n5", "n9999", "other")),
    )
    for port in (80, 7, 59_999)
]


def seconds_of(rulebook: Rulebook, labels: frozenset[tuple[str, str]]) -> float:
    """Return how long the slowest of the connections takes; the best of several turns of each."""
    slowest = 0.0
    for connection in CONNECTIONS:
        turns = []
        for _ in range(50):
            began = time.perf_counter()
            rulebook.judge("shop", labels, connection)
            turns.append(time.perf_counter() - began)
        slowest = max(slowest, min(turns))
    return slowest


@pytest.mark.parametrize("shape", SHAPES)
def test_verdict_takes_less_than_a_tenth_of_a_millisecond(shape: str) -> None:
    # Both actions are looked up alike.
    action = Action.DENY if len(shape) % 2 else Action.ALLOW
    rulebook = Rulebook()
    for policy in build(shape, action):
        rulebook.put(policy)
    seconds = seconds_of(rulebook, frozenset())
    print(f"{action} {shape}: {seconds * 1e6:.0f} us")  # noqa: T201
    assert seconds < VERDICT_SECONDS


def test_verdict_among_ten_thousand_selectors() -> None:
    rulebook = Rulebook()
    for policy in build("principals by ports", Action.ALLOW, selects=True):
        rulebook.put(policy)
    labels = frozenset({("app", "a77"), ("team", "t"), ("version", "1")})
    seconds = seconds_of(rulebook, labels)
    print(f"selectors: {seconds * 1e6:.0f} us")  # noqa: T201
    assert seconds < VERDICT_SECONDS


def tell(channel: socket.socket, told: list[messages.ToWorker]) -> None:
    for message in told:
        messages.Outbox(channel).put(message)


def test_push_is_in_force_in_a_worker_within_a_second() -> None:
    """From the new state in the control process to the worker's word that it is in force."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        worker = subprocess.Popen(
            [sys.executable, "-m", "agent.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
    ours.settimeout(30)
    enforcement = Enforcement("node", "td")
    policies = build("a principal each", Action.ALLOW)
    turns = []
    try:
        for number in range(6):
            # Each push replaces every policy. Another program on the machine may spoil some.
            state = Snapshot(policies=tuple(replace(p, warnings=(str(number),)) for p in policies))
            began = time.perf_counter()
            told = [*enforcement.change(state), messages.Ask(number)]
            sender = threading.Thread(target=tell, args=(ours, told))
            sender.start()
            assert messages.Inbox(ours).receive() == (messages.Ready(number), [])
            turns.append(time.perf_counter() - began)
            sender.join()
            if turns[-1] < PUSH_SECONDS:
                break
    finally:
        ours.close()
        assert worker.wait(30) == 0
    print("pushes:", ", ".join(f"{turn:.2f} s" for turn in turns))  # noqa: T201
    assert min(turns) < PUSH_SECONDS

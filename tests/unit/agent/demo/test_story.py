"""What the demo takes for its evidence, of all that a link carried."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from agent.demo.story import Visit
from agent.demo.wire import Direction
from agent.errors import LabError

CLIENT, SERVER, NODE, CA = (
    ip_address(f"10.{rest}") for rest in ("244.1.2", "244.2.3", "243.1.2", "243.0.1")
)
REQUEST, ANSWER = Direction(CLIENT, 40000, SERVER, 15008), Direction(SERVER, 15008, CLIENT, 40000)
CERTIFICATES = {
    Direction(NODE, 50000, CA, 15012): b"csr" * 1000,
    Direction(CA, 15012, NODE, 50000): b"certificate" * 1000,
}


def visit(streams: dict[Direction, bytes]) -> Visit:
    return Visit(b"text", f"{SERVER}:8080", 1.0, streams)


def test_answer_is_the_servers_whatever_the_ca_and_the_client_said() -> None:
    found = visit({REQUEST: b"request" * 100, ANSWER: b"answer", **CERTIFICATES})
    assert found.answer() == (ANSWER, b"answer")
    assert found.is_all_on(15008)
    assert found.shows(b"csr")


def test_answer_that_came_another_way_is_told() -> None:
    with pytest.raises(LabError, match=r"nothing from 10\.244\.2\.3"):
        visit({REQUEST: b"request", **CERTIFICATES}).answer()


@pytest.mark.parametrize("host", [SERVER, CA, NODE])
def test_another_port_is_told(host: object) -> None:
    other = Direction(CLIENT, 40001, ip_address(str(host)), 8080)
    assert not visit({REQUEST: b"", ANSWER: b"", other: b"x", **CERTIFICATES}).is_all_on(15008)

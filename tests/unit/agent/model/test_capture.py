"""The numbers of capture."""

from __future__ import annotations

from agent.model import capture


def test_every_port_of_ours_is_protected_and_none_serves_twice() -> None:
    ports = [value for name, value in vars(capture).items() if name.endswith("_PORT")]
    assert sorted(ports) == sorted(capture.LISTENER_PORTS)
    assert len(ports) == 4

"""Reasons that carry how a connection failed."""

from __future__ import annotations

from agent.model.flag import Failure, Flag, flag_of


def test_reason_carries_its_flag_and_is_a_text() -> None:
    reason = Failure("no answer", Flag.NETWORK_POLICY)
    assert reason == "no answer"
    assert flag_of(reason, Flag.CONNECT) is Flag.NETWORK_POLICY
    assert flag_of("no answer", Flag.CONNECT) is Flag.CONNECT

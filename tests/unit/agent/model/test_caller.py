"""Who asks the CA, as a value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from agent.model.caller import Caller


def test_caller_never_changes() -> None:
    caller = Caller("system:serviceaccount:sidestep-system:sidestep-agent", "node-1")
    with pytest.raises(FrozenInstanceError):
        caller.node = "node-2"  # type: ignore[misc]  # what is tested

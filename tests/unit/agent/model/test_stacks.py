"""Stacks are plain values, which a message can carry."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.stacks import Frame, Stacks


def test_stacks_travel_as_they_are() -> None:
    frame: Frame = ("read", "/a.py", 3)
    stacks: Stacks = (((frame,), 2),)
    assert pickle.loads(pickle.dumps(stacks)) == stacks

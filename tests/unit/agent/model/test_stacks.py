"""Stacks are plain values, which a message can carry."""

from __future__ import annotations

import pickle
from typing import get_args

from agent.model import stacks


def test_stacks_travel_as_they_are() -> None:
    frame: stacks.Frame = ("read", "/a.py", 3)
    found: stacks.Stacks = (((frame,), 2),)
    assert pickle.loads(pickle.dumps(found)) == found
    assert get_args(stacks.Frame) == (str, str, int)

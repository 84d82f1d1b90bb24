"""Who asks the CA: the agent of one node. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller; `name` is for the audit log."""

    name: str
    node: str

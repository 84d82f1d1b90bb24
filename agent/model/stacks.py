"""Stacks of a running program, as a sampler counts them. Pure."""

from __future__ import annotations

Frame = tuple[str, str, int]  # function, file, line
Stacks = tuple[tuple[tuple[Frame, ...], int], ...]  # innermost frame first, and how often

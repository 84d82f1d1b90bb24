"""How `--help` shows examples, in the same way for every command."""

from __future__ import annotations


def examples(*lines: str) -> str:
    """Return an epilog with command lines, each as it is typed."""
    # click keeps the lines of a paragraph that begins with \b.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)

"""Which of several objects is the oldest, where that one counts. Pure."""

from __future__ import annotations


def age(created: str) -> tuple[bool, str]:
    """Sort by this for the oldest first; what does not tell its age is the youngest.

    `created` is the time as Kubernetes writes it, in UTC; empty if nobody says.
    """
    return not created, created

"""Click commands: parse and delegate."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """Mutual TLS and identity for pods, without sidecars and without iptables."""

"""How an address and port are written, in listings, logs and `:authority` alike. Pure."""

from __future__ import annotations


def endpoint(host: str, port: int) -> str:
    """Format an address and port as in `:authority` (RFC 3986 §3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

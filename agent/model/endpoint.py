"""How an address and port are written, in listings, logs and `:authority` alike. Pure."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.model.pod import Address


@lru_cache(maxsize=1024)
def parse_address(host: str) -> Address:
    """Read an address (ValueError). Few pods speak much, so most have been read before."""
    return ip_address(host)


def endpoint(host: str, port: int) -> str:
    """Format an address and port as in `:authority` (RFC 3986 §3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

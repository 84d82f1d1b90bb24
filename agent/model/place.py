"""Where an object of the cluster is, as options name it. Pure."""

from __future__ import annotations

from agent.errors import ConfigError


def parse_place(text: str, option: str) -> tuple[str, str]:
    """Return the namespace and the name of NAMESPACE/NAME (ConfigError names the option)."""
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise ConfigError(f"{option} {text}: must be NAMESPACE/NAME")
    return namespace, name

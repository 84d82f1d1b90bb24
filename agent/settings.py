"""The settings of one agent, frozen. Pure; read from flags by `agent.commands.agent`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.errors import ConfigError
from agent.loglines import Format, Levels
from agent.model.bounds import DEFAULT_BOUNDS, Bounds
from agent.model.pod import Exclusions

if TYPE_CHECKING:
    from pathlib import Path

NO_EXCLUSIONS = Exclusions()
DEFAULT_LEVELS = Levels()


@dataclass(frozen=True, slots=True)
class AuthoritySettings:
    """How the CA is asked; `server_name` is empty for the host of the address."""

    address: str
    server_name: str
    token: Path
    roots: Path
    lifetime_seconds: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator decides; `exclusions` apply to every pod, beside the pod's own.

    Raises:
        ConfigError: two of them cannot both be.
    """

    node: str
    run_directory: Path
    pin_root: Path
    pod_cgroups: Path
    authority: AuthoritySettings
    trust_domain: str = "cluster.local"
    trust_domain_aliases: tuple[str, ...] = ()
    revoked: Path | None = None
    worker_count: int = 1
    exclusions: Exclusions = NO_EXCLUSIONS
    has_direct_path: bool = True
    kubelet_cgroup: Path | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 15020  # 0: none
    bounds: Bounds = DEFAULT_BOUNDS
    admin_port: int = 15000  # 0: none
    log_format: Format = Format.JSON
    log_levels: Levels = DEFAULT_LEVELS
    access_log_lines: int = 1000  # a second and worker; 0: all
    upkeep_seconds: float = 1.0  # between two looks at the kernel; 0: none
    drain_seconds: int = 300  # for connections to end, after a successor has taken over
    office_file: Path | None = None  # exists while this agent is the node's
    plugin_record: Path | None = None  # without it the CNI plugin lets every pod pass
    is_restarted: bool = False  # whoever started it starts it anew when it ends, as a kubelet does

    def __post_init__(self) -> None:
        if self.metrics_port and self.metrics_port == self.admin_port:
            raise ConfigError(f"--metrics-port and --admin-port are both {self.admin_port}")

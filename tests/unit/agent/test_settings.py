"""The settings of one agent: what holds where the operator says nothing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.model.pod import Exclusions
from agent.settings import NO_EXCLUSIONS, AuthoritySettings, Settings

HERE = Path("here")
AUTHORITY = AuthoritySettings("ca:15012", "", HERE, HERE, 3600)


def test_defaults_capture_everything_with_one_worker() -> None:
    settings = Settings("node-1", HERE, HERE, HERE, AUTHORITY)
    assert settings.trust_domain == "cluster.local"
    assert settings.worker_count == 1
    assert settings.exclusions == NO_EXCLUSIONS == Exclusions()


def test_settings_never_change() -> None:
    settings = Settings("node-1", HERE, HERE, HERE, AUTHORITY)
    with pytest.raises(FrozenInstanceError):
        settings.node = "node-2"  # type: ignore[misc]  # what is tested


def test_metrics_and_admin_pages_cannot_have_one_port() -> None:
    Settings("node-1", HERE, HERE, HERE, AUTHORITY, metrics_port=0, admin_port=0)
    with pytest.raises(ConfigError, match="--metrics-port and --admin-port are both 15000"):
        Settings("node-1", HERE, HERE, HERE, AUTHORITY, metrics_port=15000)

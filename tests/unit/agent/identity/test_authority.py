"""The lab's authority: what it signs, and what it refuses to be opened from."""

from __future__ import annotations

import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from agent.errors import NoCertificate
from agent.identity.authority import LocalAuthority
from agent.model.identity import SpiffeId

if TYPE_CHECKING:
    from pathlib import Path

IDENTITY = SpiffeId("cluster.local", "shop", "cart")


def openssl(*arguments: str) -> str:
    """Ask a second implementation."""
    return subprocess.run(
        ["openssl", *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_certificate_names_its_identity_and_nothing_else(tmp_path: Path) -> None:
    issued = LocalAuthority.create(tmp_path, "cluster.local").issue(IDENTITY)
    (tmp_path / "leaf.pem").write_bytes(issued.chain)
    shown = openssl("x509", "-in", str(tmp_path / "leaf.pem"), "-noout", "-text")
    assert "Subject: \n" in shown
    assert f"Subject Alternative Name: critical\n                URI:{IDENTITY}\n" in shown
    assert "Key Usage: critical\n                Digital Signature\n" in shown
    assert "CA:FALSE" in shown
    assert "P-256" in shown
    assert f"{tmp_path}/leaf.pem: OK" in openssl(
        "verify", "-CAfile", str(tmp_path / "root.pem"), str(tmp_path / "leaf.pem")
    )


def test_certificate_lasts_a_day_and_began_before_now(tmp_path: Path) -> None:
    issued = LocalAuthority.create(tmp_path, "cluster.local").issue(IDENTITY)
    (tmp_path / "leaf.pem").write_bytes(issued.chain)
    shown = openssl("x509", "-in", str(tmp_path / "leaf.pem"), "-noout", "-startdate")
    began = ssl.cert_time_to_seconds(shown.strip().removeprefix("notBefore="))
    now = datetime.now(UTC)
    assert began < now.timestamp()
    assert timedelta(hours=23, minutes=59) < issued.expires - now <= timedelta(hours=24)


def test_every_certificate_has_a_key_of_its_own(tmp_path: Path) -> None:
    authority = LocalAuthority.create(tmp_path, "cluster.local")
    assert authority.issue(IDENTITY).key != authority.issue(IDENTITY).key


def test_second_opening_finds_the_same_root(tmp_path: Path) -> None:
    first = LocalAuthority.create(tmp_path, "cluster.local").issue(IDENTITY)
    assert LocalAuthority.create(tmp_path, "cluster.local").issue(IDENTITY).roots == first.roots
    assert LocalAuthority(tmp_path).issue(IDENTITY).roots == first.roots


def test_key_of_the_root_is_for_nobody_else(tmp_path: Path) -> None:
    LocalAuthority.create(tmp_path / "ca", "cluster.local")
    assert (tmp_path / "ca/key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700


def test_directory_that_is_no_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoCertificate, match=str(tmp_path)):
        LocalAuthority(tmp_path)
    LocalAuthority.create(tmp_path, "cluster.local")
    (tmp_path / "root.pem").write_text("no certificate")
    with pytest.raises(NoCertificate, match=str(tmp_path)):
        LocalAuthority(tmp_path)


def test_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    LocalAuthority.create(tmp_path, "cluster.local")
    (tmp_path / "key.pem").write_text(openssl("genpkey", "-algorithm", "ed25519"))
    with pytest.raises(NoCertificate, match="not an elliptic-curve key"):
        LocalAuthority(tmp_path)

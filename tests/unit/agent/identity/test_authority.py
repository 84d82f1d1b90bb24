"""What the CA signs, as a second implementation sees it."""

from __future__ import annotations

import ssl
import subprocess
import time
from typing import TYPE_CHECKING

from agent.identity.local import LocalAuthority
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
        "verify", "-CAfile", str(tmp_path / "root-cert.pem"), str(tmp_path / "leaf.pem")
    )


def test_certificate_lasts_a_day_and_began_before_now(tmp_path: Path) -> None:
    issued = LocalAuthority.create(tmp_path, "cluster.local").issue(IDENTITY)
    (tmp_path / "leaf.pem").write_bytes(issued.chain)
    shown = openssl("x509", "-in", str(tmp_path / "leaf.pem"), "-noout", "-dates")
    began, ends = (
        ssl.cert_time_to_seconds(line.partition("=")[2]) for line in shown.strip().splitlines()
    )
    now = time.time()
    assert began < now - 60
    assert 24 * 3600 - 60 < ends - now <= 24 * 3600


def test_every_certificate_has_a_key_of_its_own(tmp_path: Path) -> None:
    authority = LocalAuthority.create(tmp_path, "cluster.local")
    assert authority.issue(IDENTITY).key != authority.issue(IDENTITY).key

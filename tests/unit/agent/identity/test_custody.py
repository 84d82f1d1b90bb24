"""How the CA's key is kept, and the stages in which a root is replaced."""

from __future__ import annotations

import contextlib
import itertools
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from agent.errors import ConfigError, KeyExposed, NoAuthority, RotationRefused
from agent.identity import custody, keys
from agent.identity.custody import DirectoryStore, open_authority, rotate_root
from agent.identity.tokens import TokenFile, parse_tokens
from agent.model.identity import SpiffeId
from tests.support.certificates import Maker
from tests.unit.agent.identity.test_verify import Shown, context, shake_hands

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from agent.identity.authority import Authority

IDENTITY = SpiffeId("cluster.local", "shop", "client")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def write(directory: Path, **entries: bytes) -> DirectoryStore:
    """Write entries; `ca_key` is ca-key.pem."""
    store = DirectoryStore(directory)
    store.write({f"{name.replace('_', '-')}.pem": content for name, content in entries.items()})
    return store


def test_first_start_makes_a_root_that_the_second_finds(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "ca")
    first, second = (open_authority(store, "cluster.local") for _ in range(2))
    assert first.certificate == second.certificate
    assert first.is_root
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "ca/ca-key.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o601])
def test_a_key_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    store = DirectoryStore(tmp_path)
    open_authority(store, "cluster.local")
    (tmp_path / "ca-key.pem").chmod(mode)
    with pytest.raises(KeyExposed, match=r"chmod 600 .*ca-key\.pem"):
        open_authority(store, "cluster.local")


def test_a_given_intermediate_signs_and_its_chain_is_handed_out(tmp_path: Path) -> None:
    maker = Maker()
    between = maker.intermediate("plugged in")
    store = write(tmp_path, ca_cert=between.pem, ca_key=between.key_pem, root_cert=maker.root.pem)
    authority = open_authority(store, "cluster.local")
    assert not authority.is_root
    key = keys.generate()
    csr = keys.build_csr(key, IDENTITY).decode()
    chain = authority.sign_request(csr, IDENTITY, timedelta(hours=1))
    assert [chain[1], chain[2]] == [between.pem.decode(), maker.root.pem.decode()]
    with pytest.raises(RotationRefused, match="intermediate"):
        rotate_root(store, "trust", "cluster.local", DAY, NOW)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda maker: {"ca_key": maker.leaf().key_pem}, "does not belong"),
        (lambda maker: {"ca_key": b"not a key"}, "not a private key"),
        (lambda maker: {"ca_cert": maker.leaf().pem}, "does not belong"),
        (lambda maker: {"root_cert": Maker().root.pem}, "do not lead"),
        (lambda maker: {"root_cert": b"nonsense"}, "not PEM"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused(
    tmp_path: Path, break_it: object, match: str
) -> None:
    maker = Maker()
    right = {
        "ca_cert": maker.root.pem, "ca_key": maker.root.key_pem, "root_cert": maker.root.pem
    }  # fmt: skip
    wrong: Mapping[str, bytes] = break_it(maker)  # type: ignore[operator]  # a table of lambdas
    with pytest.raises(NoAuthority, match=match) as caught:
        open_authority(write(tmp_path, **right | dict(wrong)), "cluster.local")
    assert "BEGIN" not in str(caught.value)


@pytest.mark.parametrize("missing", ["ca-key.pem", "ca-cert.pem"])
def test_half_of_a_ca_is_not_replaced_by_a_new_one(tmp_path: Path, missing: str) -> None:
    store = DirectoryStore(tmp_path)
    open_authority(store, "cluster.local")
    (tmp_path / missing).unlink()
    with pytest.raises(NoAuthority, match=missing):
        open_authority(store, "cluster.local")


@pytest.mark.parametrize("stage", ["trust", "sign", "finish"])
def test_root_of_no_ca_cannot_be_rotated_and_none_is_made(
    tmp_path: Path, stage: custody.Stage
) -> None:
    store = DirectoryStore(tmp_path / "wrong")
    with pytest.raises(NoAuthority, match=r"there is no CA: neither ca-cert\.pem nor ca-key\.pem"):
        rotate_root(store, stage, "cluster.local", DAY, NOW)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("missing", ["next-key.pem", "next-cert.pem"])
def test_half_of_the_next_root_does_not_sign(tmp_path: Path, missing: str) -> None:
    store = DirectoryStore(tmp_path)
    before = open_authority(store, "cluster.local").certificate
    rotate_root(store, "trust", "cluster.local", DAY, NOW)
    (tmp_path / missing).unlink()
    with pytest.raises(NoAuthority, match=missing):
        rotate_root(store, "sign", "cluster.local", DAY, NOW + DAY)
    assert open_authority(store, "cluster.local").certificate == before


def test_a_leaf_that_is_plugged_in_as_ca_is_refused(tmp_path: Path) -> None:
    maker = Maker()
    leaf = maker.leaf()
    store = write(tmp_path, ca_cert=leaf.pem, ca_key=leaf.key_pem, root_cert=maker.root.pem)
    with pytest.raises(NoAuthority, match="no CA"):
        open_authority(store, "cluster.local")


def shown_by(authority: Authority) -> Shown:
    from tests.support.certificates import Made

    key = keys.generate()
    csr = keys.build_csr(key, IDENTITY).decode()
    (leaf, _roots) = authority.sign_request(csr, IDENTITY, timedelta(hours=1))
    return Shown(Made(x509.load_pem_x509_certificate(leaf.encode()), key))


def trust(one: Authority, other: Authority) -> bool:
    """Whether a client of one and a server of the other let each other in."""
    ends = [
        context(shown_by(authority), authority.bundle.encode(), is_server=is_server)
        for authority, is_server in ((one, False), (other, True))
    ]
    failures = shake_hands(ends[0], ends[1])[2]
    assert all(isinstance(failure, ssl.SSLError) for failure in failures.values())
    return not failures


def test_neighbouring_stages_trust_each_other_and_distant_ones_do_not(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    authorities = [open_authority(store, "cluster.local")]
    moment = NOW
    for stage in ("trust", "sign", "finish"):
        rotate_root(store, stage, "cluster.local", DAY, moment)
        authorities.append(open_authority(store, "cluster.local"))
        moment += DAY
    for before, after in itertools.pairwise(authorities):
        assert trust(before, after)
        assert trust(after, before)
    assert not trust(authorities[0], authorities[2])
    assert not trust(authorities[3], authorities[1])
    old, new = authorities[0].certificate, authorities[3].certificate
    assert [set(authority.roots) for authority in authorities] == [
        {old}, {old, new}, {old, new}, {new}
    ]  # fmt: skip
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["ca-cert.pem", "ca-key.pem", "root-cert.pem"]


def test_a_stage_out_of_turn_is_refused(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    open_authority(store, "cluster.local")
    for stage in ("sign", "finish"):
        with pytest.raises(RotationRefused, match="next stage of this CA's root is trust"):
            rotate_root(store, stage, "cluster.local", DAY, NOW)
    rotate_root(store, "trust", "cluster.local", DAY, NOW)
    with pytest.raises(RotationRefused, match="is sign, not trust"):
        rotate_root(store, "trust", "cluster.local", DAY, NOW + DAY)


def test_a_stage_too_early_is_refused_and_says_when(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    open_authority(store, "cluster.local")
    rotate_root(store, "trust", "cluster.local", DAY, NOW)
    with pytest.raises(RotationRefused, match="2026-01-02T00:00:00"):
        rotate_root(store, "sign", "cluster.local", DAY, NOW + DAY - timedelta(seconds=1))
    rotate_root(store, "sign", "cluster.local", DAY, NOW + DAY)


class Interrupted(Exception):
    pass


class CutStore(DirectoryStore):
    """Is killed after a number of entries."""

    def __init__(self, directory: Path, left: int) -> None:
        super().__init__(directory)
        self._left = left

    def write(self, entries: Mapping[str, bytes | None]) -> None:
        for name, content in entries.items():
            if not self._left:
                raise Interrupted
            self._left -= 1
            super().write({name: content})


@pytest.mark.parametrize("stage", ["trust", "sign", "finish"])
@pytest.mark.parametrize("left", range(5))
def test_a_stage_that_is_cut_off_can_be_completed(
    tmp_path: Path, stage: custody.Stage, left: int
) -> None:
    store = DirectoryStore(tmp_path)
    open_authority(store, "cluster.local")
    moment = NOW
    stages: list[custody.Stage] = ["trust", "sign", "finish"]
    for before in stages[: stages.index(stage)]:
        rotate_root(store, before, "cluster.local", DAY, moment)
        moment += DAY
    with contextlib.suppress(Interrupted):
        rotate_root(CutStore(tmp_path, left), stage, "cluster.local", DAY, moment)
    if custody.describe_rotation(store.read())[0] != (None if stage == "finish" else stage):
        rotate_root(store, stage, "cluster.local", DAY, moment)
    open_authority(store, "cluster.local")
    for after in stages[stages.index(stage) + 1 :]:
        moment += DAY
        rotate_root(store, after, "cluster.local", DAY, moment)
    assert len(open_authority(store, "cluster.local").roots) == 1


def test_tokens_are_read_and_wrong_lines_are_named_without_the_token() -> None:
    text = "# lab\nabcdefghijklmnop east\nqrstuvwxyzabcdef west # second\n"
    assert parse_tokens(text, "t") == {"abcdefghijklmnop": "east", "qrstuvwxyzabcdef": "west"}
    for wrong in ("short east", "abcdefghijklmnop", "abcdefghijklmnop a b", text + text):
        with pytest.raises(ConfigError, match="t, line ") as caught:
            parse_tokens(wrong, "t")
        assert "abcdefgh" not in str(caught.value)


def test_tokens_that_others_can_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("abcdefghijklmnop east\n")
    path.chmod(0o644)
    with pytest.raises(KeyExposed):
        TokenFile(path)

"""What an agent takes from a CA: a chain for its key and its identity, and nothing else."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.errors import AuthorityRefused
from agent.identity import keys, wire
from agent.identity.authority import Authority, create_root
from agent.identity.client import AuthorityClient
from agent.model.identity import SpiffeId

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.identity.issuer import Certificate

IDENTITY = SpiffeId("cluster.local", "shop", "cart")
ADMIN = SpiffeId("cluster.local", "shop", "admin")
NOWHERE = Path("/nonexistent")
LIFETIME = timedelta(hours=1)
KEY_USAGE, BASIC_CONSTRAINTS = b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13"  # their OIDs in DER
AUTHORITY = Authority(create_root("us"))


def sign(key: keys.PrivateKey, identity: SpiffeId = IDENTITY) -> list[str]:
    return AUTHORITY.sign_request(keys.build_csr(key, identity).decode(), identity, LIFETIME)


def take(key: keys.PrivateKey, answer: bytes) -> Certificate:
    """Take the CA's answer to a request for `key` and `IDENTITY`."""
    return AuthorityClient("ca:15012", "", NOWHERE, NOWHERE, 3600)._check(IDENTITY, key, answer)


def doubled(texts: list[str]) -> list[str]:
    """Return the chain with a leaf that has one extension twice."""
    leaf, *above = texts
    der = x509.load_pem_x509_certificate(leaf.encode()).public_bytes(Encoding.DER)
    assert der.count(KEY_USAGE) == 1
    ruined = der.replace(KEY_USAGE, BASIC_CONSTRAINTS)
    return [x509.load_der_x509_certificate(ruined).public_bytes(Encoding.PEM).decode(), *above]


def test_chain_for_our_key_and_identity_is_taken() -> None:
    key = keys.generate()
    taken = take(key, wire.build_response(sign(key)))
    assert taken.identity == IDENTITY
    assert taken.key == keys.build_pem(key)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda _key: b"\xff\xff", "is no certificate chain: "),
        (lambda _key: b"", "is no certificate chain: "),
        (lambda _key: wire.build_response(["hello", "world"]), "is no certificate chain: .*PEM"),
        (
            lambda key: wire.build_response(doubled(sign(key))),
            "is no certificate chain: .*uplicate",
        ),
        (lambda key: wire.build_response(sign(key, ADMIN)), f"another identity than {IDENTITY}"),
        (lambda _key: wire.build_response(sign(keys.generate())), "another key than ours"),
        (
            lambda key: wire.build_response([*sign(key)[:-1], create_root("b").roots.decode()]),
            "does not lead to one of the roots",
        ),
    ],
)
def test_any_other_answer_is_refused_by_name(
    build: Callable[[keys.PrivateKey], bytes], reason: str
) -> None:
    key = keys.generate()
    with pytest.raises(AuthorityRefused, match=reason):
        take(key, build(key))

"""The error tree: what the edges may rely on."""

from __future__ import annotations

import pytest

from agent import errors


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        (errors.ManifestError, errors.ConfigError),
        (errors.FeatureMissing, errors.KernelError),
        (errors.AbiMismatch, errors.KernelError),
        (errors.UntrustedPeer, errors.IdentityError),
        (errors.SandboxNotFound, errors.EnrollError),
        (errors.LocalProtocolError, errors.TunnelError),
    ],
)
def test_error_belongs_to_the_family_that_says_who_must_act(
    kind: type[errors.SidestepError], family: type[errors.SidestepError]
) -> None:
    assert issubclass(kind, family)
    assert issubclass(family, errors.SidestepError)
    assert kind.reason != family.reason


def test_fault_of_a_peer_carries_its_code_beside_the_message() -> None:
    error = errors.RemoteProtocolError("a window is too large", 3)
    assert (str(error), error.code, error.reason) == ("a window is too large", 3, "protocol_remote")

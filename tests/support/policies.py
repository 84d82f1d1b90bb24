"""Policies for tests, read from objects as users write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.discovery.translate import SourcedObject, translate

if TYPE_CHECKING:
    from agent.model.policy import AnyPolicy


def authorization(
    name: str, action: str = "ALLOW", *rules: Any, namespace: str = "default", **spec: Any
) -> AnyPolicy:
    """Read an AuthorizationPolicy."""
    spec |= {"action": action, "rules": list(rules)}
    return _read("AuthorizationPolicy", name, namespace, spec)


def authentication(name: str, mode: str, namespace: str = "default", **spec: Any) -> AnyPolicy:
    """Read a PeerAuthentication."""
    return _read("PeerAuthentication", name, namespace, {"mtls": {"mode": mode}, **spec})


def from_account(account: str, *ports: str) -> dict[str, Any]:
    """Return a rule: from an account of the namespace `default`, to some ports."""
    rule: dict[str, Any] = {"from": [{"source": {"serviceAccounts": [f"default/{account}"]}}]}
    return rule | ({"to": [{"operation": {"ports": list(ports)}}]} if ports else {})


def _read(kind: str, name: str, namespace: str, spec: dict[str, Any]) -> AnyPolicy:
    body: dict[str, object] = {
        "apiVersion": "security.istio.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }
    translation = translate([SourcedObject("test", body)])
    assert translation.problems == ()
    (policy,) = translation.snapshot.policies
    return policy

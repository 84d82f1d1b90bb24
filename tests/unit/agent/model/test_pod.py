"""A pod of this node as a value."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from agent.model.pod import Exclusions, LocalPod


def pod(exclusions: Exclusions) -> LocalPod:
    return LocalPod("u-1", "shop", "cart-0", "cart", (ip_address("10.0.0.1"),), exclusions)


def test_pod_differs_if_what_it_excludes_differs() -> None:
    # The reconciler enrolls anew what is not equal.
    network = ip_network("10.0.0.0/8")
    wishes = [
        Exclusions(),
        Exclusions(outbound_ports=frozenset({80})),
        Exclusions(outbound_networks=(network,)),
        Exclusions(inbound_ports=frozenset({80})),
    ]
    assert len({pod(wish) for wish in wishes}) == len(wishes)
    assert pod(Exclusions()) == LocalPod("u-1", "shop", "cart-0", "cart", (ip_address("10.0.0.1"),))

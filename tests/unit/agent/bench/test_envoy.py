"""The configuration of the Envoy pair: what a client asks for is what the server answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.bench.envoy import Config, Credentials, build_client, build_server

OWN, PEER = "spiffe://cluster.local/ns/shop/sa/own", "spiffe://cluster.local/ns/shop/sa/peer"
CREDENTIALS = Credentials("chain.pem", "key.pem", "roots.pem", PEER)
AUTHORITY, APPLICATION = "10.0.0.2:8080", ("127.0.0.1", 9000)


def built(http2: Config | None = None) -> tuple[Config, Config]:
    client = build_client(("10.0.0.2", 15008), [(7001, AUTHORITY)], CREDENTIALS, http2)
    server = build_server(("10.0.0.2", 15008), [(AUTHORITY, APPLICATION)], CREDENTIALS, http2)
    return client, server


def find(part: Any, name: str) -> list[Any]:
    """List every value of a key, at any depth."""
    found = []
    if isinstance(part, dict):
        found += [value for key, value in part.items() if key == name]
        part = list(part.values())
    for below in part if isinstance(part, list) else ():
        found += find(below, name)
    return found


def address(host: str, port: int) -> Config:
    return {"address": host, "port_value": port}


def test_client_sends_each_of_its_ports_through_a_tunnel_to_the_peer() -> None:
    client, _server = built()
    assert find(client["static_resources"]["listeners"], "socket_address") == [
        address("127.0.0.1", 7001)
    ]
    assert find(client, "tunneling_config") == [{"hostname": AUTHORITY}]
    assert find(client["static_resources"]["clusters"], "socket_address") == [
        address("10.0.0.2", 15008)
    ]


def test_server_connects_each_authority_to_its_application() -> None:
    _client, server = built()
    assert find(server["static_resources"]["listeners"], "socket_address") == [
        address("10.0.0.2", 15008)
    ]
    (route,) = find(server, "route")
    assert find(server, "domains") == [[AUTHORITY]]
    (cluster,) = server["static_resources"]["clusters"]
    assert cluster["name"] == route["cluster"]
    assert find(cluster, "socket_address") == [address(*APPLICATION)]
    assert route["timeout"] == "0s"  # a tunnel lasts as long as its connection


@pytest.mark.parametrize("side", [0, 1], ids=["client", "server"])
def test_each_side_proves_itself_and_accepts_one_peer(side: int) -> None:
    (context,) = find(built()[side], "common_tls_context")
    assert find(context, "filename") == ["chain.pem", "key.pem", "roots.pem"]
    assert find(context, "exact") == [PEER]
    assert set(context["tls_params"].values()) == {"TLSv1_3"}
    assert context["alpn_protocols"] == ["h2"]


def test_server_takes_nobody_without_a_certificate() -> None:
    assert find(built()[1], "require_client_certificate") == [True]


def test_settings_of_http2_reach_both_sides() -> None:
    client, server = built({"initial_stream_window_size": 1 << 20})
    for side in (client, server):
        (options,) = find(side, "http2_protocol_options")
        assert options["initial_stream_window_size"] == 1 << 20
    assert find(server, "allow_connect") == [True]


def test_configuration_is_what_json_can_say() -> None:
    for side in built():
        assert json.loads(json.dumps(side)) == side

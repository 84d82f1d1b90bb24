"""The configuration of the Envoy pair: each side proves itself, and trusts one peer only."""

from __future__ import annotations

from agent.bench.envoy import Credentials, build_client, build_server

OWN = Credentials("/c.pem", "/k.pem", "/r.pem", "spiffe://td/ns/shop/sa/server")


def test_client_sends_each_port_through_a_tunnel_to_its_authority() -> None:
    config = build_client(("10.0.0.2", 15008), [(7001, "10.0.0.3:80"), (7002, "[::1]:81")], OWN)
    listeners = config["static_resources"]["listeners"]
    assert [listener["address"]["socket_address"]["port_value"] for listener in listeners] == [
        7001,
        7002,
    ]
    tunnels = [
        listener["filter_chains"][0]["filters"][0]["typed_config"]["tunneling_config"]["hostname"]
        for listener in listeners
    ]
    assert tunnels == ["10.0.0.3:80", "[::1]:81"]
    (cluster,) = config["static_resources"]["clusters"]
    tls = cluster["transport_socket"]["typed_config"]["common_tls_context"]
    names = tls["validation_context"]["match_typed_subject_alt_names"]
    assert names == [{"san_type": "URI", "matcher": {"exact": OWN.peer}}]
    assert tls["tls_params"]["tls_minimum_protocol_version"] == "TLSv1_3"


def test_server_requires_a_certificate_and_leads_each_authority_to_its_application() -> None:
    config = build_server(("0.0.0.0", 15008), [("10.0.0.3:80", ("127.0.0.1", 80))], OWN)
    (listener,) = config["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    assert chain["transport_socket"]["typed_config"]["require_client_certificate"] is True
    manager = chain["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    assert host["domains"] == ["10.0.0.3:80"]
    (cluster,) = config["static_resources"]["clusters"]
    assert cluster["name"] == host["routes"][0]["route"]["cluster"] == "10.0.0.3:80"


def test_options_of_http2_reach_both_sides() -> None:
    small = {"initial_stream_window_size": 65535}
    client = build_client(("10.0.0.2", 15008), [], OWN, small)["static_resources"]["clusters"][0]
    (options,) = client["typed_extension_protocol_options"].values()
    assert options["explicit_http_config"]["http2_protocol_options"] == small
    server = build_server(("0.0.0.0", 1), [], OWN, small)["static_resources"]["listeners"][0]
    manager = server["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["http2_protocol_options"] == {"allow_connect": True, **small}

"""The configuration of an Envoy pair that speaks HBONE, as plain values. Pure.

The client takes TCP connections on loopback and sends each through one stream of a CONNECT tunnel;
the server ends the tunnel and connects to the application. Both show a SPIFFE certificate and check
the other's. What is not named here is Envoy's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Config = dict[str, Any]
TYPES = "type.googleapis.com/envoy.extensions"
HTTP = f"{TYPES}.upstreams.http.v3.HttpProtocolOptions"


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM files of one side, and the one identity that it accepts."""

    chain: str
    key: str
    roots: str
    peer: str

    def config(self) -> Config:
        """Return a CommonTlsContext."""
        matcher = {"san_type": "URI", "matcher": {"exact": self.peer}}
        return {
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": self.chain},
                    "private_key": {"filename": self.key},
                }
            ],
            "validation_context": {
                "trusted_ca": {"filename": self.roots},
                "match_typed_subject_alt_names": [matcher],
            },
        }


def _address(host: str, port: int) -> Config:
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster(name: str, host: str, port: int) -> Config:
    endpoint = {"endpoint": {"address": _address(host, port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        # Its default of 1,024 connections is a protection, not a property of its speed.
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}
            ]
        },
    }


def _bootstrap(listeners: list[Config], clusters: list[Config]) -> Config:
    return {
        "node": {"id": "bench", "cluster": "bench"},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def build_client(
    peer: tuple[str, int],
    tunneled: Sequence[tuple[int, str]],
    credentials: Credentials,
    http2: Config | None = None,
) -> Config:
    """Return a bootstrap: each (local port, authority) is sent to `peer` in a tunnel."""
    listeners = [
        {
            "name": f"outbound-{port}",
            "address": _address("127.0.0.1", port),
            "filter_chains": [
                {
                    "filters": [
                        {
                            "name": "envoy.filters.network.tcp_proxy",
                            "typed_config": {
                                "@type": f"{TYPES}.filters.network.tcp_proxy.v3.TcpProxy",
                                "stat_prefix": "outbound",
                                "cluster": "peer",
                                "tunneling_config": {"hostname": authority},
                            },
                        }
                    ]
                }
            ],
        }
        for port, authority in tunneled
    ]
    cluster = _cluster("peer", *peer)
    cluster["typed_extension_protocol_options"] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": HTTP,
            "explicit_http_config": {"http2_protocol_options": http2 or {}},
        }
    }
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{TYPES}.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": credentials.config(),
        },
    }
    return _bootstrap(listeners, [cluster])


def build_server(
    own: tuple[str, int],
    served: Sequence[tuple[str, tuple[str, int]]],
    credentials: Credentials,
    http2: Config | None = None,
) -> Config:
    """Return a bootstrap: CONNECT to each authority goes to the address beside it."""
    routes = [
        {
            "name": authority,
            "domains": [authority],
            "routes": [
                {
                    "match": {"connect_matcher": {}},
                    "route": {
                        "cluster": authority,
                        "timeout": "0s",
                        "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                    },
                }
            ],
        }
        for authority, _address in served
    ]
    manager = {
        "@type": f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inbound",
        "codec_type": "HTTP2",
        "route_config": {"name": "inbound", "virtual_hosts": routes},
        "http2_protocol_options": {"allow_connect": True, **(http2 or {})},
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPES}.filters.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "name": "inbound",
        "address": _address(*own),
        "filter_chains": [
            {
                "transport_socket": {
                    "name": "envoy.transport_sockets.tls",
                    "typed_config": {
                        "@type": f"{TYPES}.transport_sockets.tls.v3.DownstreamTlsContext",
                        "require_client_certificate": True,
                        "common_tls_context": credentials.config(),
                    },
                },
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ],
            }
        ],
    }
    return _bootstrap([listener], [_cluster(name, *address) for name, address in served])

"""`sidestep agent`: run the node agent."""

from __future__ import annotations

import asyncio
import os
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from agent import logs
from agent.app import Agent
from agent.commands.examples import examples
from agent.datapath import features, links, pins
from agent.descriptors import raise_limit
from agent.discovery.directory import DirectorySource
from agent.discovery.selector_pairs import parse_pairs
from agent.errors import ConfigError
from agent.heap import share_one_arena
from agent.kubelet import find_cgroup
from agent.log_sink import never_stall
from agent.loglines import Format, parse_levels
from agent.model.bounds import DEFAULT_BOUNDS, Bounds, buffers_within
from agent.model.enrollment import DEFAULT_PAIRS, OWN_NAMESPACE, EnrollmentRules
from agent.model.place import parse_place
from agent.model.pod import Exclusions
from agent.secrecy import keep_memory_private
from agent.settings import AuthoritySettings, Settings

if TYPE_CHECKING:
    from agent.discovery.source import Source

_DIRECTORY = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)
_PORT = click.IntRange(1, 65535)


MOST_WORKERS = 8  # unless more are asked for: each takes memory, on nodes that have no use for it


def default_workers() -> int:
    """Return one worker for each two processors: the pods need the others, and memory counts."""
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // 2))


@click.command(
    epilog=examples(
        "sidestep agent --node n1 --source kubernetes --ca sidestep-ca.sidestep-system.svc:15012",
        "sidestep agent --node east --objects ./objects --ca 127.0.0.1:15012 --ca-token token "
        "--ca-root root.pem",
    )
)
@click.option("--node", required=True, help="Name of this node, as in spec.nodeName of its pods.")
@click.option(
    "--source", type=click.Choice(["kubernetes"]),
    help="Where the objects come from: the API server of the cluster that this process is in.",
)  # fmt: skip
@click.option("--objects", type=_EXISTING, help="Instead of --source: a directory of objects.")
@click.option(
    "--run-dir", type=_DIRECTORY, default="/run/sidestep", show_default=True,
    help="For the agent's socket; one agent for each.",
)  # fmt: skip
@click.option(
    "--pins", "pin_root", type=_DIRECTORY, default=pins.DEFAULT_ROOT, show_default=True,
    help="Where programs, maps and links are pinned, on a BPF file system.",
)  # fmt: skip
@click.option(
    "--pod-cgroups", type=_EXISTING, default="/sys/fs/cgroup", show_default=True,
    help="Where the cgroups of this node's pods are.",
)  # fmt: skip
@click.option(
    "--ca", "ca_address", required=True, metavar="HOST:PORT", help="The mesh's CA; or unix:PATH."
)
@click.option("--ca-name", default="", help="Name in the CA's certificate, if not its host's.")
@click.option(
    "--ca-token", type=_FILE, default="/var/run/secrets/tokens/istio-token", show_default=True,
    help="File with this agent's token, read for each request.",
)  # fmt: skip
@click.option(
    "--ca-root", type=_FILE, default="/var/run/secrets/istio/root-cert.pem", show_default=True,
    help="File with the roots to trust, read again when it changes.",
)  # fmt: skip
@click.option(
    "--certificate-lifetime", type=click.IntRange(5), default=24 * 3600, show_default=True,
    metavar="SECONDS", help="How long certificates are to be valid.",
)  # fmt: skip
@click.option("--crl", type=_FILE, help="File with revoked certificates, read when it changes.")
@click.option(
    "--trust-domain", default="cluster.local", show_default=True,
    help="First part of every identity here.",
)  # fmt: skip
@click.option("--trust-domain-alias", multiple=True, help="Another one whose pods are let in.")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=default_workers,
    show_default=f"one for each two processors, at most {MOST_WORKERS}",
    help="Processes that move bytes.",
)  # fmt: skip
@click.option(
    "--handshake-timeout", type=click.FloatRange(0.1, 300), metavar="SECONDS",
    default=DEFAULT_BOUNDS.handshake_seconds, show_default=True,
    help="For TLS, and again for HTTP/2, of a tunnel.",
)  # fmt: skip
@click.option(
    "--tunnel-idle-timeout", type=click.FloatRange(1, 86400), metavar="SECONDS",
    default=DEFAULT_BOUNDS.idle_seconds, show_default=True,
    help="A tunnel without a connection is closed after that.",
)  # fmt: skip
@click.option(
    "--streams-per-tunnel", type=click.IntRange(1, 10_000),
    default=DEFAULT_BOUNDS.streams_per_tunnel, show_default=True,
    help="Connections that share a tunnel; a peer may open twice as many.",
)  # fmt: skip
@click.option(
    "--tunnels-per-peer", type=click.IntRange(1, 10_000),
    default=DEFAULT_BOUNDS.tunnels_per_peer, show_default=True,
    help="From one pod to one workload, in each worker.",
)  # fmt: skip
@click.option(
    "--header-bytes", type=click.IntRange(1024, 1 << 20),
    default=DEFAULT_BOUNDS.header_bytes, show_default=True,
    help="Size of a request's headers that a peer may send.",
)  # fmt: skip
@click.option(
    "--stream-buffer-bytes", type=click.IntRange(65_535, 1 << 30),
    default=DEFAULT_BOUNDS.stream_buffer_bytes, show_default=True,
    help="What a peer may send ahead of a slow reader, for each connection.",
)  # fmt: skip
@click.option(
    "--process-buffer-bytes", type=click.IntRange(1 << 20, 1 << 40),
    default=DEFAULT_BOUNDS.process_buffer_bytes, show_default=True,
    help="What each worker keeps for slow readers: of all pods, and of one pod a quarter.",
)  # fmt: skip
@click.option(
    "--memory-limit", type=click.IntRange(1), metavar="BYTES",
    help="What agent and workers may use together. Half of it is for slow readers, where "
    "--process-buffer-bytes does not say how much and its default is more.",
)  # fmt: skip
@click.option(
    "--connections-per-pod", type=click.IntRange(1, 1 << 20),
    default=DEFAULT_BOUNDS.connections_per_pod, show_default=True,
    help="Both directions together, and as many accepted tunnels, in each worker.",
)  # fmt: skip
@click.option(
    "--spare-descriptors", type=click.IntRange(16, 1 << 16),
    default=DEFAULT_BOUNDS.spare_descriptors, show_default=True,
    help="Open files below a worker's hard limit that connections do not get.",
)  # fmt: skip
@click.option("--exclude-outbound-port", type=_PORT, multiple=True, help="Never captured.")
@click.option("--exclude-outbound-network", multiple=True, metavar="CIDR", help="Never captured.")
@click.option("--exclude-inbound-port", type=_PORT, multiple=True, help="Never captured.")
@click.option(
    "--direct-path/--no-direct-path", default=True, show_default=True,
    help="Whether the kernel may join two pods of this node after a verdict, without TLS between.",
)  # fmt: skip
@click.option(
    "--kubelet-cgroup", type=_DIRECTORY,
    help="Whose probes reach the pods; by default the usual cgroups are looked for.",
)  # fmt: skip
@click.option(
    "--root-namespace", default="istio-system", show_default=True,
    help="Policies in it are about the whole mesh.",
)  # fmt: skip
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=15020, show_default=True,
    help="Port for GET /metrics; 0 for none.",
)  # fmt: skip
@click.option(
    "--metrics-host", default="127.0.0.1", show_default=True,
    help="Address of that port; :: is every one, of IPv4 as well, for a Prometheus elsewhere.",
)  # fmt: skip
@click.option(
    "--admin-port", type=click.IntRange(0, 65535), default=15000, show_default=True,
    help="Port of 127.0.0.1 for health, /config_dump and the log level; 0 for none.",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice([each.value for each in Format]), default="json",
    show_default=True, help="How each line of the log looks.",
)  # fmt: skip
@click.option(
    "--log-level", "log_levels", default="info", show_default=True, metavar="LEVEL[,SCOPE=LEVEL]",
    help="debug, info, warning, error or off. access=debug also logs the start of connections.",
)  # fmt: skip
@click.option(
    "--access-log-lines", type=click.IntRange(0), default=1000, show_default=True,
    help="Of a second and a worker; what is beyond is counted in one line. 0 writes all.",
)  # fmt: skip
@click.option(
    "--upkeep-seconds", type=click.FloatRange(0), default=1, show_default=True,
    help="How often to look whether the kernel still holds what it ought to; 0: never.",
)  # fmt: skip
@click.option(
    "--drain-seconds", type=click.IntRange(0), default=300, show_default=True,
    help="How long connections may last after a new agent has taken over, or at an uninstall.",
)  # fmt: skip
@click.option(
    "--daemonset", metavar="NAMESPACE/NAME",
    help="The agents' own. Where it is deleted, an agent that ends takes its pods out of the mesh; "
    "else they stay captured for the next one. One that was succeeded stays until it is told to "
    "end, since it would be started anew.",
)  # fmt: skip
@click.option(
    "--plugin-record", type=_FILE,
    help="The CNI plugin's record of its installation. Where the DaemonSet is deleted the agent "
    "removes it: pods that start from then on need no agent.",
)  # fmt: skip
@click.option(
    "--office-file", type=_FILE,
    help="Exists while this agent is the node's: for a probe, since what listens on the node's "
    "ports may be the agent before this one.",
)  # fmt: skip
@click.option(
    "--enrollment-selectors", metavar="YAML",
    help="Which pods take part, as in Istio's enablementSelectors; "
    "by default the label istio.io/dataplane-mode of the pod, then of its namespace.",
)  # fmt: skip
@click.option(
    "--exclude-namespace", multiple=True, default=("kube-system",), show_default=True,
    help="No pod in it takes part.",
)  # fmt: skip
@click.option(
    "--own-namespace", default=OWN_NAMESPACE, show_default=True,
    help="Our own pods are those in it that have the label app.kubernetes.io/part-of=sidestep.",
)  # fmt: skip
def agent(
    node: str,
    source: str | None,
    objects: Path | None,
    run_dir: Path,
    pin_root: Path,
    pod_cgroups: Path,
    ca_address: str,
    ca_name: str,
    ca_token: Path,
    ca_root: Path,
    certificate_lifetime: int,
    crl: Path | None,
    trust_domain: str,
    trust_domain_alias: tuple[str, ...],
    workers: int,
    handshake_timeout: float,
    tunnel_idle_timeout: float,
    streams_per_tunnel: int,
    tunnels_per_peer: int,
    header_bytes: int,
    stream_buffer_bytes: int,
    process_buffer_bytes: int,
    memory_limit: int | None,
    connections_per_pod: int,
    spare_descriptors: int,
    exclude_outbound_port: tuple[int, ...],
    exclude_outbound_network: tuple[str, ...],
    exclude_inbound_port: tuple[int, ...],
    direct_path: bool,
    kubelet_cgroup: Path | None,
    root_namespace: str,
    metrics_port: int,
    metrics_host: str,
    admin_port: int,
    log_format: str,
    log_levels: str,
    access_log_lines: int,
    upkeep_seconds: float,
    drain_seconds: int,
    daemonset: str | None,
    plugin_record: Path | None,
    office_file: Path | None,
    enrollment_selectors: str | None,
    exclude_namespace: tuple[str, ...],
    own_namespace: str,
) -> None:
    """Run the node agent: load the programs, follow the objects, serve the pods."""
    features.require()
    if not is_authority(ca_address):
        raise ConfigError(f"--ca {ca_address}: must be HOST:PORT or unix:PATH")
    try:
        networks = tuple(ip_network(network) for network in exclude_outbound_network)
    except ValueError as error:
        raise ConfigError(f"--exclude-outbound-network: {error}") from error
    source_of_buffers = click.get_current_context().get_parameter_source("process_buffer_bytes")
    if memory_limit and source_of_buffers is ParameterSource.DEFAULT:
        process_buffer_bytes = buffers_within(memory_limit, workers)
    keep_memory_private()
    share_one_arena()
    raise_limit()
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    exclusions = Exclusions(
        frozenset(exclude_outbound_port), networks, frozenset(exclude_inbound_port)
    )
    settings = Settings(
        node=node,
        run_directory=run_dir,
        pin_root=pin_root,
        pod_cgroups=pod_cgroups,
        authority=AuthoritySettings(ca_address, ca_name, ca_token, ca_root, certificate_lifetime),
        trust_domain=trust_domain,
        trust_domain_aliases=trust_domain_alias,
        revoked=crl,
        worker_count=workers,
        exclusions=exclusions,
        has_direct_path=direct_path,
        kubelet_cgroup=kubelet_cgroup or find_cgroup(links.cgroup_root()),
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        bounds=Bounds(
            handshake_timeout,
            tunnel_idle_timeout,
            streams_per_tunnel,
            tunnels_per_peer,
            header_bytes,
            stream_buffer_bytes,
            process_buffer_bytes,
            connections_per_pod,
            spare_descriptors,
        ),
        admin_port=admin_port,
        log_format=Format(log_format),
        log_levels=parse_levels(log_levels),
        access_log_lines=access_log_lines,
        upkeep_seconds=upkeep_seconds,
        drain_seconds=drain_seconds,
        office_file=office_file,
        plugin_record=plugin_record,
        is_restarted=daemonset is not None,
    )
    rules = EnrollmentRules(
        DEFAULT_PAIRS if enrollment_selectors is None else parse_pairs(enrollment_selectors),
        frozenset(exclude_namespace),
        own_namespace,
    )
    own = None if daemonset is None else parse_place(daemonset, "--daemonset")
    followed = _open_source(source, objects, root_namespace, rules, own)
    never_stall()
    logs.set_up(settings.log_format, settings.log_levels)

    async def run() -> None:
        await Agent(settings, followed).run()

    asyncio.run(run())


def is_authority(address: str) -> bool:
    """Say whether gRPC could ever reach a CA there: it would try for ever, without a word."""
    if address.startswith("unix:"):
        return True
    try:
        found = urlsplit(f"//{address}")
        return found.netloc == address and bool(found.hostname and found.port)
    except ValueError:
        return False


def _open_source(
    source: str | None,
    objects: Path | None,
    root_namespace: str,
    rules: EnrollmentRules,
    daemonset: tuple[str, str] | None,
) -> Source:
    if (source is None) == (objects is None):
        raise ConfigError("give where the objects come from: --source kubernetes or --objects")
    if objects is not None:
        return DirectorySource(objects, root_namespace, rules)
    # Here, since only an agent in a cluster has to carry the client's memory.
    from agent.discovery.kubernetes import KubernetesSource

    return KubernetesSource.open(root_namespace, rules, daemonset=daemonset)

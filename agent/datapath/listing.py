"""What the pins hold, in words: the rows of `sidestep maps` and `sidestep programs`.

Reads pins and nothing else, so it works while no agent runs, and with pins that an agent of another
build left: layouts come from the maps themselves, and a layout that cannot be explained is refused
with AbiMismatch. Never writes. Netns cookies are named by ss_pod_names of the same directory.

Called by `agent.commands`.
"""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING

from agent.datapath import libbpf, links
from agent.datapath.counters import read_counts
from agent.datapath.maps import Map
from agent.datapath.records import (
    INBOUND,
    NETWORK_HEAD_BITS,
    OUTBOUND,
    PLAINTEXT,
    V4_MAPPED_BITS,
    unpack_address,
)
from agent.datapath.source import LOOKUP_PROGRAM
from agent.errors import AbiMismatch, FeatureMissing, KernelError, MapError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.datapath.btf import Value
    from agent.datapath.counters import Count
    from agent.datapath.maps import Record

Row = dict[str, object]
PodNames = dict[int, str]

ROOTS = (Path("/sys/fs/bpf/sidestep"), Path("/sys/fs/bpf/sidestep-lab"))
SEARCH_DEPTH = 3  # <root>/<lab>/<node>/<schema hash>
# enum bpf_map_type
MAP_TYPES = {
    1: "hash",
    2: "array",
    5: "percpu_hash",
    6: "percpu_array",
    9: "lru_hash",
    11: "lpm_trie",
    18: "sockhash",
    24: "sk_storage",
    27: "ringbuf",
}
DIRECTIONS: dict[int, object] = {OUTBOUND: "outbound", INBOUND: "inbound", PLAINTEXT: "plaintext"}
OUTCOMES = {0: "passed", 1: "plaintext", 2: "spoofed", 3: "fragment"}  # enum outcome
DECISIONS = {0: "passed", 1: "direct", 2: "captured", 3: "refused"}  # enum capture
POD_COUNTERS = (
    "outbound_packets",
    "outbound_bytes",
    "inbound_packets",
    "inbound_bytes",
    "dropped_plaintext",
    "dropped_spoofed",
    "dropped_fragment",
)
UNLISTED_TYPES = {6, 24, 27}  # without entries that could be listed
# enum bpf_prog_type, in the words of bpftool
PROGRAM_TYPES = {3: "sched_cls", 13: "sock_ops", 18: "cgroup_sock_addr", 30: "sk_lookup"}
LOOKUP_LINK = links.lookup_link_name(0).removesuffix("0")


def find_directories(roots: tuple[Path, ...] = ROOTS) -> list[Path]:
    """Return the pin directories at and below `roots` (FeatureMissing without the right)."""
    found: list[Path] = []

    def search(place: Path, depth: int) -> None:
        if (place / "maps").is_dir() and (place / "programs").is_dir():
            found.append(place)
        elif depth < SEARCH_DEPTH and place.is_dir():
            for below in sorted(place.iterdir()):
                search(below, depth + 1)

    try:
        for root in roots:
            search(root, 0)
    except PermissionError as error:
        raise FeatureMissing(f"root is missing: {error.filename} cannot be read") from error
    return found


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[Map]:
    opened = Map(directory / "maps" / name)
    try:
        yield opened
    finally:
        opened.close()


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise AbiMismatch(f"a map holds {len(value)} bytes where a number should be")
    return value


def _text(value: Value) -> str:
    if isinstance(value, int):
        raise AbiMismatch("a map holds a number where a text should be")
    text = value.split(b"\0", 1)[0].decode(errors="replace")
    # Whoever may write the map must not be able to write escape sequences to a terminal.
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _address(value: Value) -> str | None:
    if isinstance(value, int):
        raise AbiMismatch("a map holds a number where an address should be")
    return str(unpack_address(value)) if any(value) else None


def pod_names(directory: Path) -> PodNames:
    """Return namespace/name of each pod by its netns cookie; empty if the map is not there."""
    if not (directory / "maps/ss_pod_names").exists():
        return {}
    with _opened(directory, "ss_pod_names") as opened:
        return {
            _number(key["value"]): f"{_text(value['namespace'])}/{_text(value['name'])}"
            for key, value in opened.items()
        }


def _owner(cookie: Value, names: PodNames) -> Row:
    return {"pod": names.get(_number(cookie)), "netns_cookie": cookie}


def _pod(key: Record, value: Record, names: PodNames) -> Row:
    families = {f"address{n}": _address(value[f"address{n}"]) for n in (4, 6)}
    return _owner(key["value"], names) | families


def _pod_name(key: Record, value: Record, _names: PodNames) -> Row:
    return {
        "netns_cookie": key["value"],
        "namespace": _text(value["namespace"]),
        "name": _text(value["name"]),
        "uid": _text(value["uid"]),
    }


def _origin_flow(key: Record, value: Record, names: PodNames) -> Row:
    return _owner(key["netns_cookie"], names) | {
        "source": _address(key["address"]),
        "source_port": key["port_be"],
        "destination": _address(value["address"]),
        "destination_port": value["port_be"],
        "endpoint": _address(value["endpoint"]),
        "endpoint_port": value["endpoint_port_be"],
    }


def _prober(key: Record, _value: Record, _names: PodNames) -> Row:
    return {"cgroup_id": key["value"]}


def _service(key: Record, value: Record, _names: PodNames) -> Row:
    return {
        "address": _address(key["address"]),
        "port": key["port_be"],
        "endpoints": value["value"],
    }


def _endpoint(key: Record, value: Record, _names: PodNames) -> Row:
    return {
        "service": _address(key["address"]),
        "port": key["port_be"],
        "index": key["index"],
        "endpoint": _address(value["address"]),
        "endpoint_port": value["port_be"],
    }


def _agent_flow(key: Record, _value: Record, names: PodNames) -> Row:
    return _owner(key["netns_cookie"], names) | {
        "source": _address(key["source"]),
        "source_port": key["source_port_be"],
        "destination_port": key["destination_port_be"],
    }


def _local(key: Record, value: Record, names: PodNames) -> Row:
    return _owner(value["netns_cookie"], names) | {
        "address": _address(key["address"]),
        "interface": value["link"] or None,
    }


def _generation(_key: Record, value: Record, _names: PodNames) -> Row:
    return {"generation": value["value"]}


def _verdict(key: Record, value: Record, names: PodNames) -> Row:
    return {
        "source": names.get(_number(key["source_netns_cookie"])),
        "destination": names.get(_number(key["destination_netns_cookie"])),
        "port": key["port_be"],
        "family": "ipv6" if key["is_v6"] else "ipv4",
        "generation": value["value"],
    }


def _direct_flow(_key: Record, value: Record, names: PodNames) -> Row:
    return {
        "source_pod": names.get(_number(value["source_netns_cookie"])),
        "source": _address(value["source"]),
        "source_port": value["source_port_be"],
        "destination_pod": names.get(_number(value["destination_netns_cookie"])),
        "destination": _address(value["destination"]),
        "destination_port": value["destination_port_be"],
    }


def _lost(_key: Record, value: Record, _names: PodNames) -> Row:
    return {"lost_flow_ends": value["value"]}


def _bypass(key: Record, _value: Record, names: PodNames) -> Row:
    address = unpack_address(key["address"])
    bits = _number(key["prefix_bits"]) - NETWORK_HEAD_BITS
    if isinstance(address, IPv4Address):
        bits -= V4_MAPPED_BITS
    try:
        network = str(ip_network((address, bits), strict=False))
    except ValueError as error:
        raise AbiMismatch(f"ss_bypass holds no network: {error}") from error
    return _owner(key["netns_cookie"], names) | {"network": network}


def _guard(key: Record, value: Record, names: PodNames) -> Row:
    return _owner(value["netns_cookie"], names) | {"interface": key["value"]}


def _guard_flow(key: Record, _value: Record, names: PodNames) -> Row:
    return _owner(key["netns_cookie"], names) | {
        "local": _address(key["local"]),
        "local_port": key["local_port_be"],
        "remote": _address(key["remote"]),
        "remote_port": key["remote_port_be"],
    }


def _counter(count: Count, names: PodNames) -> Row:
    return _owner(count.netns_cookie, names) | {
        "interface": count.ifindex,
        "direction": DIRECTIONS.get(count.direction),
        "outcome": OUTCOMES.get(count.outcome),
        "packets": count.packets,
        "bytes": count.bytes,
    }


def _capture(key: Record, value: Record, names: PodNames) -> Row:
    return _owner(key["netns_cookie"], names) | {
        "direction": DIRECTIONS.get(_number(key["direction"]), key["direction"]),
        "decision": DECISIONS.get(_number(key["decision"]), key["decision"]),
        "connections": value["value"],
    }


def _port(key: Record, _value: Record, names: PodNames) -> Row:
    direction = DIRECTIONS.get(_number(key["direction"]), key["direction"])
    return _owner(key["netns_cookie"], names) | {"direction": direction, "port": key["port_be"]}


def _listener(key: Record, value: Record, names: PodNames) -> Row:
    # Read from user space, a sockhash shows the cookie of the socket (sock_hash_lookup_sys).
    return _owner(key["value"], names) | {"socket_cookie": value["value"]}


def _meta(_key: Record, value: Record, _names: PodNames) -> Row:
    return {
        "magic": _number(value["magic"]).to_bytes(8, "big").decode("ascii", "replace"),
        "schema": _text(value["schema"]),
        "programs": _text(value["programs"]),
        "lookup_instructions": value["lookup_instructions"],
    }


def _lookup_text(key: Record, value: Record, _names: PodNames) -> Row:
    return {"index": key["value"], "instruction": f"{_number(value['value']):016x}"}


_DECODERS: dict[str, Callable[[Record, Record, PodNames], Row]] = {
    "ss_pods": _pod,
    "ss_pod_names": _pod_name,
    "ss_origin_flow": _origin_flow,
    "ss_agent_flows": _agent_flow,
    "ss_local": _local,
    "ss_probers": _prober,
    "ss_services": _service,
    "ss_endpoints": _endpoint,
    "ss_generation": _generation,
    "ss_verdicts": _verdict,
    "ss_direct_flows": _direct_flow,
    "ss_lost": _lost,
    "ss_guards": _guard,
    "ss_guard_flows": _guard_flow,
    "ss_captures": _capture,
    "ss_bypass": _bypass,
    "ss_ports": _port,
    "ss_listeners": _listener,
    "ss_meta": _meta,
    "ss_lookup_text": _lookup_text,
}
COLUMNS = {
    "ss_pods": ("pod", "netns_cookie", "address4", "address6"),
    "ss_pod_names": ("netns_cookie", "namespace", "name", "uid"),
    "ss_origin_flow": (
        "pod",
        "source",
        "source_port",
        "destination",
        "destination_port",
        "endpoint",
        "endpoint_port",
    ),
    "ss_agent_flows": ("pod", "source", "source_port", "destination_port"),
    "ss_local": ("pod", "netns_cookie", "address", "interface"),
    "ss_probers": ("cgroup_id",),
    "ss_services": ("address", "port", "endpoints"),
    "ss_endpoints": ("service", "port", "index", "endpoint", "endpoint_port"),
    "ss_generation": ("generation",),
    "ss_verdicts": ("source", "destination", "port", "family", "generation"),
    "ss_direct_flows": (
        "source_pod",
        "source",
        "source_port",
        "destination_pod",
        "destination",
        "destination_port",
    ),
    "ss_lost": ("lost_flow_ends",),
    "ss_guards": ("pod", "netns_cookie", "interface"),
    "ss_guard_flows": ("pod", "local", "local_port", "remote", "remote_port"),
    "ss_counters": ("pod", "interface", "direction", "outcome", "packets", "bytes"),
    "ss_captures": ("pod", "direction", "decision", "connections"),
    "ss_bypass": ("pod", "netns_cookie", "network"),
    "ss_ports": ("pod", "netns_cookie", "direction", "port"),
    "ss_listeners": ("pod", "netns_cookie", "socket_cookie"),
    "ss_meta": ("magic", "schema", "programs", "lookup_instructions"),
    "ss_lookup_text": ("index", "instruction"),
}


def list_maps(directory: Path) -> list[Row]:
    """Return one row for each map of `directory`; not every type has a count of entries."""
    rows: list[Row] = []
    for path in sorted((directory / "maps").iterdir()):
        with _opened(directory, path.name) as opened:
            facts = opened.facts
            is_walkable = facts.type not in UNLISTED_TYPES
            keys = libbpf.keys(opened.fd, facts.key_size, facts.max_entries)
            rows.append(
                {
                    "name": path.name,
                    "type": MAP_TYPES.get(facts.type, str(facts.type)),
                    "id": facts.id,
                    "key": opened.key.name,
                    "key_bytes": facts.key_size,
                    "value": opened.value.name,
                    "value_bytes": facts.value_size,
                    "entries": sum(1 for _ in keys) if is_walkable else None,
                    "max_entries": facts.max_entries if is_walkable else None,
                    "pins": str(directory),
                }
            )
    return rows


def columns(name: str) -> tuple[str, ...]:
    """Return the columns of one map (MapError for one that has no entries to list)."""
    if name not in COLUMNS:
        raise MapError(
            f"{name} has no entries to list: the kernel keeps those of socket storage with the "
            "sockets, and events go to one reader; ss_origin_flow lists the captured connections, "
            "ss_direct_flows those on the direct path"
        )
    return COLUMNS[name]


def dump_map(directory: Path, name: str) -> list[Row]:
    """Return the decoded entries of a map that has `columns`."""
    names = pod_names(directory)
    if name == "ss_counters":
        return [_counter(count, names) | {"pins": str(directory)} for count in _counts(directory)]
    decode = _DECODERS[name]
    with _opened(directory, name) as opened:
        try:
            rows = [
                decode(key, value, names) | {"pins": str(directory)}
                for key, value in opened.items()
            ]
        except KeyError as error:
            raise AbiMismatch(f"{directory}/maps/{name} has no member {error}") from error
    if name == "ss_lookup_text":
        return rows[: _lookup_length(directory)]
    return rows


def describe_entry(name: str, key: Record, value: Record, names: PodNames) -> Row:
    """Return one entry of a map that has `columns`, as `dump_map` lists it."""
    return _DECODERS[name](key, value, names)


def _counts(directory: Path) -> list[Count]:
    with _opened(directory, "ss_guards") as guards, _opened(directory, "ss_counters") as counters:
        try:
            return list(read_counts(guards, counters))
        except KeyError as error:
            raise AbiMismatch(f"{directory}/maps/ss_guards has no member {error}") from error


def _lookup_length(directory: Path) -> int:
    with _opened(directory, "ss_meta") as opened:
        meta = opened.get({"value": 0}) or {}
    return _number(meta.get("lookup_instructions", 0))


def list_pods(directory: Path) -> list[Row]:
    """Return one row for each enrolled pod: where it is, and what the guard counted."""
    names = pod_names(directory)
    counted: dict[Value, dict[str, int]] = {}
    for count in _counts(directory):
        totals = counted.setdefault(count.netns_cookie, dict.fromkeys(POD_COUNTERS, 0))
        outcome = OUTCOMES[count.outcome]
        if outcome == "passed":
            direction = DIRECTIONS[count.direction]
            totals[f"{direction}_packets"] += count.packets
            totals[f"{direction}_bytes"] += count.bytes
        else:
            totals[f"dropped_{outcome}"] += count.packets
    with _opened(directory, "ss_guards") as opened:
        guarded = {value["netns_cookie"] for _key, value in opened.items()}
    with _opened(directory, "ss_pods") as opened:
        return [
            _pod(key, value, names)
            | {"strict": bool(value["is_strict"]), "guarded": key["value"] in guarded}
            | {"pins": str(directory)}
            | (counted.get(key["value"]) or dict.fromkeys(POD_COUNTERS, 0))
            for key, value in opened.items()
        ]


def _place(facts: libbpf.LinkFacts) -> str:
    if facts.type == libbpf.LINK_TYPE_NETNS:
        # The kernel clears the inode when the namespace goes (bpf_netns_link_fill_info).
        return f"netns inode {facts.target}" if facts.target else "a netns that is gone"
    try:
        root = links.cgroup_root()
    except FeatureMissing:
        return f"cgroup id {facts.target}"
    is_root = root.stat().st_ino == facts.target
    return f"cgroup {root}" if is_root else f"cgroup id {facts.target}"


def _program_row(
    fd: int, directory: Path, attached: str | None, link: int | None, pods: list[str]
) -> Row:
    facts = libbpf.program_facts(fd)
    return {
        "name": facts.name,
        "type": PROGRAM_TYPES.get(facts.type, str(facts.type)),
        "id": facts.id,
        "tag": facts.tag,
        "instruction_bytes": facts.instruction_bytes,
        "attached": attached,
        "link": link,
        "pods": pods,  # for which alone it is attached
        "pins": str(directory),
    }


def list_programs(directory: Path) -> list[Row]:
    """Return one row for each pinned program, and one for each pod's copy of the lookup."""
    names = pod_names(directory)
    attached: dict[int, tuple[str, int]] = {}
    copies: list[tuple[int, str, int, list[str]]] = []
    guarded: dict[int, list[int]] = {}
    guarded_pods: dict[int, set[str]] = {}
    for path in sorted((directory / "links").iterdir()):
        with libbpf.closing(libbpf.open_pin(path)) as fd:
            facts = libbpf.link_facts(fd)
        if facts.type == libbpf.LINK_TYPE_TCX:
            guarded.setdefault(facts.program_id, []).append(facts.target)
            pod = names.get(links.guarded_cookie(path.name))
            guarded_pods.setdefault(facts.program_id, set()).update({pod} if pod else ())
            continue
        cookie = path.name.removeprefix(LOOKUP_LINK)
        if cookie != path.name and cookie.isdecimal():
            pod = names.get(int(cookie), f"netns cookie {cookie}")
            pod_text = f"pod {pod}" if facts.target else f"pod {pod}, whose netns is gone"
            copies.append((facts.program_id, pod_text, facts.id, [pod]))
        else:
            attached[facts.program_id] = (_place(facts), facts.id)
    rows: list[Row] = []
    for path in sorted((directory / "programs").iterdir()):
        with libbpf.closing(libbpf.open_pin(path)) as fd:
            program_id = libbpf.program_facts(fd).id
            found = attached.get(program_id)
            place: str | None = found[0] if found else None
            link = found[1] if found else None
            if interfaces := guarded.get(program_id):
                place = f"interfaces {', '.join(map(str, sorted(interfaces)))}"
            if path.name == LOOKUP_PROGRAM:
                place = f"as a copy for each pod: {len(copies)}"
            pods = sorted(guarded_pods.get(program_id, ()))
            rows.append(_program_row(fd, directory, place, link, pods))
    for program_id, pod_place, pod_link, pods in copies:
        # The program may have gone with its link meanwhile.
        with (
            contextlib.suppress(KernelError),
            libbpf.closing(libbpf.open_program(program_id)) as fd,
        ):
            rows.append(_program_row(fd, directory, pod_place, pod_link, pods))
    return rows

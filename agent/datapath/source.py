"""The BPF sources: what they declare, their text as one, and the hashes that name it.

Says which programs and maps there are; the C files say what they do. The maps' names stand here and
in bpf/include/maps.h, and tests/bpf compares the two.

Reads files below bpf/, nothing else. Used by the compiler child and by whoever opens its pins.
"""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "bpf"
MAIN = "sidestep.c"
MAGIC = 0x53494445_53544550  # "SIDESTEP"
NETNS_COOKIE_MARK = 0x51DE57E9C00C1E55  # the constant in lookup.c that each copy replaces

# program -> (enum bpf_prog_type, enum bpf_attach_type) of linux/bpf.h
CGROUP_PROGRAMS = {
    "ss_connect4": (18, 10),
    "ss_connect6": (18, 11),
    "ss_getpeername4": (18, 29),
    "ss_getpeername6": (18, 30),
    "ss_bind4": (18, 8),
    "ss_bind6": (18, 9),
    "ss_sockops": (13, 3),
}
# From the pod, to the pod: seen from the node's side of the link those are ingress and egress.
GUARD_PROGRAMS = {"ss_guard_out": (3, 46), "ss_guard_in": (3, 47)}
LOOKUP_PROGRAM = "ss_lookup"
# bcc has no name for sk_lookup.
PROGRAMS = CGROUP_PROGRAMS | GUARD_PROGRAMS | {LOOKUP_PROGRAM: (30, 36)}
MAPS = (
    "ss_pods",
    "ss_pod_names",
    "ss_exempt",
    "ss_origin",
    "ss_origin_flow",
    "ss_probers",
    "ss_agent_flows",
    "ss_local",
    "ss_services",
    "ss_endpoints",
    "ss_generation",
    "ss_verdicts",
    "ss_probes",
    "ss_direct_flows",
    "ss_bypass",
    "ss_ports",
    "ss_listeners",
    "ss_guards",
    "ss_guard_flows",
    "ss_counters",
    "ss_captures",
    "ss_flow_end",
    "ss_lost",
    "ss_meta",
    "ss_lookup_text",
)
RING_BUFFERS = ("ss_flow_ends",)  # without keys and values; a map of its own holds the layout
LD_IMM64 = 0x18
PSEUDO_MAP_FD = 1  # source register of a ld_imm64 whose constant is a map's descriptor


def expand(name: str, sources: Path = SOURCES, seen: set[str] | None = None) -> str:
    """Return the text of bpf/`name` with our own includes put in place, each once."""
    seen = set() if seen is None else seen
    seen.add(name)
    path = next(path for path in (sources / name, sources / "include" / name) if path.exists())
    lines = [f'#line 1 "{path}"']
    for number, line in enumerate(path.read_text().splitlines(), start=2):
        included = re.fullmatch(r'#include "([^"]+)"', line)
        if included is None:
            lines.append(line)
        elif included[1] not in seen:
            lines += [expand(included[1], sources, seen), f'#line {number} "{path}"']
        else:
            lines.append("")
    return "\n".join(lines)


def _digest(*names: str, sources: Path) -> str:
    text = "".join(expand(name, sources) for name in names)
    return hashlib.sha256(re.sub(r"(?m)^#line .*$", "", text).encode()).hexdigest()[:16]


def schema_hash(sources: Path = SOURCES) -> str:
    """Name the layout of the maps: pins of another layout live in another directory."""
    return _digest("maps.h", sources=sources)


def program_hash(sources: Path = SOURCES) -> str:
    """Name the text of all programs: an agent with other programs loads its own."""
    return _digest(MAIN, sources=sources)


def relocatable_text(program: bytes, map_index_by_fd: dict[int, int]) -> list[int]:
    """Return the instructions of a loaded program with map descriptors as indexes into MAPS."""
    instructions = []
    for (instruction,) in struct.iter_unpack("=Q", program):
        word = instruction
        if word & 0xFF == LD_IMM64 and (word >> 12) & 0xF == PSEUDO_MAP_FD:
            word = (word & 0xFFFFFFFF) | map_index_by_fd[word >> 32] << 32
        instructions.append(word)
    return instructions


def stamped_text(instructions: list[int], netns_cookie: int, map_fds: list[int]) -> bytes:
    """Return a loadable copy of the lookup program for one netns.

    The inverse of `relocatable_text`: indexes become descriptors, and the mark the cookie.
    """
    words = []
    following_high: int | None = None
    for word in instructions:
        if following_high is not None:
            words.append(following_high << 32)
            following_high = None
            continue
        if word & 0xFF == LD_IMM64 and (word >> 12) & 0xF == PSEUDO_MAP_FD:
            words.append((word & 0xFFFFFFFF) | map_fds[word >> 32] << 32)
        elif word & 0xFF == LD_IMM64 and word >> 32 == NETNS_COOKIE_MARK & 0xFFFFFFFF:
            words.append((word & 0xFFFFFFFF) | (netns_cookie & 0xFFFFFFFF) << 32)
            following_high = netns_cookie >> 32
        else:
            words.append(word)
    return struct.pack(f"={len(words)}Q", *words)

"""Numbers that C and Python both know are the same; gcc says what C's are."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from agent import netns, sock_diag
from agent.datapath import counters, features, libbpf, listing, pins, records, source
from agent.model import capture
from agent.tunnel import sockets

if TYPE_CHECKING:
    from pathlib import Path

HEADERS = """\
#include "host.h"
#include "capture.h"
#include <asm/socket.h>
#include <linux/capability.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/magic.h>
#include <linux/netlink.h>
#include <linux/sched.h>
#include <linux/sock_diag.h>
"""


def ask_gcc(expressions: list[str], folder: Path) -> dict[str, int]:
    """Return the value of each C expression."""
    lines = [f'printf("%lld\\n", (long long)({expression}));' for expression in expressions]
    program, text = folder / "numbers", folder / "numbers.c"
    text.write_text("\n".join([HEADERS, "int main(void) {", *lines, "return 0; }"]))
    includes = [f"-I{source.SOURCES / 'tests'}", f"-I{source.SOURCES / 'include'}"]
    command = ["gcc", "-std=gnu11", *includes, str(text), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    values = [int(line) for line in printed.stdout.splitlines()]
    return dict(zip(expressions, values, strict=True))


def enumerators(header: str, name: str) -> list[str]:
    """List what an enum of ours declares, in order."""
    text = (source.SOURCES / "include" / header).read_text()
    body = re.search(rf"^enum {name} {{\n(.*?)^}};", text, re.DOTALL | re.MULTILINE)
    assert body is not None, name
    return re.findall(r"^\t([A-Z_0-9]+)\b", body[1], re.MULTILINE)


def test_ports_are_those_of_the_programs(tmp_path: Path) -> None:
    text = (source.SOURCES / "include/capture.h").read_text()
    declared = re.findall(r"^#define (PORT_\w+)", text, re.MULTILINE)
    found = ask_gcc(declared, tmp_path)
    assert found == {
        "PORT_OUTBOUND": capture.OUTBOUND_PORT,
        "PORT_INBOUND": capture.INBOUND_PORT,
        "PORT_INBOUND_HBONE": capture.HBONE_PORT,
        "PORT_DNS": capture.DNS_PORT,
    }
    assert set(found.values()) == capture.LISTENER_PORTS


def test_every_port_of_ours_is_protected_by_bind() -> None:
    text = (source.SOURCES / "include/capture.h").read_text()
    declared = re.findall(r"^#define (PORT_\w+)", text, re.MULTILINE)
    bind = (source.SOURCES / "bind.c").read_text()
    assert sorted(re.findall(r"bpf_htons\((PORT_\w+)\)", bind)) == sorted(declared)


def test_directions_have_the_values_that_python_writes(tmp_path: Path) -> None:
    found = ask_gcc(enumerators("types.h", "direction"), tmp_path)
    assert found == {
        f"DIRECTION_{name}": getattr(records, name) for name in ("OUTBOUND", "INBOUND", "PLAINTEXT")
    }


def test_outcomes_have_the_names_that_python_shows(tmp_path: Path) -> None:
    found = ask_gcc(enumerators("types.h", "outcome"), tmp_path)
    assert found == {f"OUTCOME_{name.upper()}": n for n, name in listing.OUTCOMES.items()}
    assert len(found) == counters.OUTCOME_COUNT
    assert ask_gcc(["OUTCOMES"], tmp_path) == {"OUTCOMES": len(found)}


def test_address_is_packed_as_the_programs_do(tmp_path: Path) -> None:
    expressions = [f"address_from_v4(bpf_htonl(0x0a000001)).bytes[{i}]" for i in range(16)]
    packed = bytes(ask_gcc(expressions, tmp_path).values())
    assert str(records.unpack_address(packed)) == "10.0.0.1"
    assert records.pack_address(records.unpack_address(packed)) == packed


def test_prefix_counts_what_stands_before_the_address(tmp_path: Path) -> None:
    head = "8 * (offsetof(struct network, address) - sizeof(((struct network *)0)->prefix_bits))"
    assert ask_gcc([head], tmp_path) == {head: records.NETWORK_HEAD_BITS}


def test_mark_of_the_cookie_is_in_the_program_once() -> None:
    text = (source.SOURCES / "lookup.c").read_text()
    assert text.count(f"{source.NETNS_COOKIE_MARK:#x}") == 1


def test_programs_have_the_types_of_the_kernel(tmp_path: Path) -> None:
    expected = {
        "ss_connect4": ("CGROUP_SOCK_ADDR", "BPF_CGROUP_INET4_CONNECT"),
        "ss_connect6": ("CGROUP_SOCK_ADDR", "BPF_CGROUP_INET6_CONNECT"),
        "ss_getpeername4": ("CGROUP_SOCK_ADDR", "BPF_CGROUP_INET4_GETPEERNAME"),
        "ss_getpeername6": ("CGROUP_SOCK_ADDR", "BPF_CGROUP_INET6_GETPEERNAME"),
        "ss_bind4": ("CGROUP_SOCK_ADDR", "BPF_CGROUP_INET4_BIND"),
        "ss_bind6": ("CGROUP_SOCK_ADDR", "BPF_CGROUP_INET6_BIND"),
        "ss_sockops": ("SOCK_OPS", "BPF_CGROUP_SOCK_OPS"),
        "ss_lookup": ("SK_LOOKUP", "BPF_SK_LOOKUP"),
    }
    # tcx is of Linux 6.6; the headers of Debian 12 do not know its attach types.
    known = {
        name: pair for name, pair in source.PROGRAMS.items() if not name.startswith("ss_guard")
    }
    asked = [f"BPF_PROG_TYPE_{kind}" for kind, _at in expected.values()]
    found = ask_gcc(sorted({*asked, *(at for _kind, at in expected.values())}), tmp_path)
    assert known == {
        name: (found[f"BPF_PROG_TYPE_{kind}"], found[at]) for name, (kind, at) in expected.items()
    }


def test_listings_name_types_as_the_kernel_does(tmp_path: Path) -> None:
    maps = {f"BPF_MAP_TYPE_{name.upper()}": n for n, name in listing.MAP_TYPES.items()}
    programs = {f"BPF_PROG_TYPE_{name.upper()}": n for n, name in listing.PROGRAM_TYPES.items()}
    assert ask_gcc([*maps, *programs], tmp_path) == maps | programs


def test_maps_of_one_value_for_each_processor_are_known(tmp_path: Path) -> None:
    asked = ["PERCPU_HASH", "PERCPU_ARRAY", "LRU_PERCPU_HASH", "PERCPU_CGROUP_STORAGE"]
    found = ask_gcc([f"BPF_MAP_TYPE_{name}" for name in asked], tmp_path)
    assert set(found.values()) == libbpf.PER_CPU_MAP_TYPES


@pytest.mark.parametrize(
    ("expression", "ours"),
    [
        ("BPF_PROG_TYPE_SK_LOOKUP", libbpf.PROGRAM_TYPE_SK_LOOKUP),
        ("BPF_SK_LOOKUP", libbpf.ATTACH_SK_LOOKUP),
        ("BPF_ANY", libbpf.UPDATE_ANY),
        ("BPF_MAP_TYPE_SOCKHASH", libbpf.MAP_TYPE_SOCKHASH),
        ("BPF_MAP_TYPE_RINGBUF", libbpf.MAP_TYPE_RINGBUF),
        ("BPF_LINK_TYPE_NETNS", libbpf.LINK_TYPE_NETNS),
        ("BPF_FS_MAGIC", pins.BPF_FS_MAGIC),
        ("CLONE_NEWNET", netns.CLONE_NEWNET),
        ("SO_NETNS_COOKIE", netns.SO_NETNS_COOKIE),
        ("SO_NETNS_COOKIE", features.SO_NETNS_COOKIE),
        ("SO_COOKIE", netns.SO_COOKIE),
        ("IP_TRANSPARENT", sockets.IP_TRANSPARENT),
        ("IPV6_TRANSPARENT", sockets.IPV6_TRANSPARENT),
        ("IP_BIND_ADDRESS_NO_PORT", sockets.IP_BIND_ADDRESS_NO_PORT),
        ("NETLINK_SOCK_DIAG", sock_diag.NETLINK_SOCK_DIAG),
        ("SOCK_DESTROY", sock_diag.SOCK_DESTROY),
        ("NLM_F_REQUEST", sock_diag.NLM_F_REQUEST),
        ("NLM_F_ACK", sock_diag.NLM_F_ACK),
        *features.CAPABILITIES.items(),
    ],
)
def test_number_is_that_of_the_exported_headers(expression: str, ours: int, tmp_path: Path) -> None:
    assert ask_gcc([expression], tmp_path)[expression] == ours

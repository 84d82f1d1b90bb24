"""Compile and load the BPF programs with bcc, in a process of its own that ends at once.

bcc brings LLVM, 70 to 140 MB that are never returned, so the agent never imports this module: it
runs `python -m agent.datapath.compiler STAGING`. The child leaves maps and programs pinned under
STAGING and ends; the parent moves the directory to its place (`agent.datapath.pins`).

No kernel headers are needed. bcc is pointed (BCC_KERNEL_SOURCE) at a tree made of bpf/kbuild, which
stands in for the four internal headers that bcc asks for, and of the exported headers of
linux-libc-dev.

bcc rewrites map methods in the main text only, not in included files, so our own includes are
expanded before it sees them; `#line` keeps the file names in compiler messages.

Exit code 0, or 1 with the reason on stderr.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).parents[2] / "bpf"
MAIN = "sidestep.c"
MAGIC = 0x53494445_53544550  # "SIDESTEP"
NETNS_COOKIE_MARK = 0x51DE57E9C00C1E55  # the constant in lookup.c that each copy replaces

# program -> (enum bpf_prog_type, enum bpf_attach_type) of linux/bpf.h
PROGRAMS = {
    "ss_connect4": (18, 10),
    "ss_connect6": (18, 11),
    "ss_getpeername4": (18, 29),
    "ss_getpeername6": (18, 30),
    "ss_bind4": (18, 8),
    "ss_bind6": (18, 9),
    "ss_sockops": (13, 3),
}
LOOKUP_PROGRAM = "ss_lookup"
LOOKUP_TYPE = (30, 36)  # bcc has no name for sk_lookup
MAPS = (
    "ss_pods",
    "ss_pod_names",
    "ss_exempt",
    "ss_origin",
    "ss_origin_flow",
    "ss_agent_flows",
    "ss_bypass",
    "ss_ports",
    "ss_listeners",
    "ss_meta",
    "ss_lookup_text",
)
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


@contextlib.contextmanager
def _header_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sidestep-headers-") as name:
        tree = Path(name)
        shutil.copytree(SOURCES / "kbuild", tree, dirs_exist_ok=True)
        exported = tree / "include/uapi"
        exported.mkdir(exist_ok=True)
        (exported / "linux").symlink_to("/usr/include/linux")
        (exported / "asm-generic").symlink_to("/usr/include/asm-generic")
        (exported / "asm").symlink_to(f"/usr/include/{platform.machine()}-linux-gnu/asm")
        yield tree


def relocatable_text(program: bytes, map_index_by_fd: dict[int, int]) -> list[int]:
    """Return the instructions of a loaded program with map descriptors as indexes into MAPS."""
    instructions = []
    for (instruction,) in struct.iter_unpack("=Q", program):
        word = instruction
        if word & 0xFF == LD_IMM64 and (word >> 12) & 0xF == PSEUDO_MAP_FD:
            word = (word & 0xFFFFFFFF) | map_index_by_fd[word >> 32] << 32
        instructions.append(word)
    return instructions


def _load(staging: Path) -> None:
    from bcc import BPF, lib  # heavy, and only ever in this process

    with _header_tree() as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        flags = [f'-DSS_PINS="{staging}/maps"', "-Wno-macro-redefined", "-Wno-duplicate-decl-specifier"]
        module: Any = BPF(text=expand(MAIN), cflags=flags)

    def pin(fd: int, name: str) -> None:
        if lib.bpf_obj_pin(fd, str(staging / "programs" / name).encode()) < 0:
            raise OSError(f"{name} cannot be pinned under {staging}")

    for name, (program_type, attach_type) in PROGRAMS.items():
        pin(module.load_func(name, program_type, attach_type=attach_type).fd, name)
    # Loaded so that the verifier sees it here; what serves a pod is a stamped copy.
    program_type, attach_type = LOOKUP_TYPE
    pin(module.load_func(LOOKUP_PROGRAM, program_type, attach_type=attach_type).fd, LOOKUP_PROGRAM)

    fds = {lib.bpf_table_fd(module.module, name.encode()): i for i, name in enumerate(MAPS)}
    text = relocatable_text(module.dump_func(LOOKUP_PROGRAM), fds)
    for index, instruction in enumerate(text):
        module["ss_lookup_text"][module["ss_lookup_text"].Key(index)] = module[
            "ss_lookup_text"
        ].Leaf(instruction)
    meta = module["ss_meta"].Leaf(
        magic=MAGIC,
        schema=schema_hash().encode(),
        programs=program_hash().encode(),
        lookup_instructions=len(text),
    )
    module["ss_meta"][module["ss_meta"].Key(0)] = meta


def main() -> int:
    """Load into the staging directory named by the only argument."""
    staging = Path(sys.argv[1])
    (staging / "maps").mkdir()
    (staging / "programs").mkdir()
    (staging / "links").mkdir()
    try:
        _load(staging)
    except Exception as error:  # this process's last act: bcc raises bare Exception
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # the report
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

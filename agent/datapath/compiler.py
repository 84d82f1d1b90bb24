"""Compile and load the BPF programs with bcc, in a process of its own that ends at once.

bcc brings LLVM, 70 to 140 MB that are never returned, so the agent never imports this module: it
runs `python -m agent.datapath.compiler STAGING [MAPS]`. The child leaves maps and programs pinned
under STAGING and ends; the parent moves them to their place (`agent.datapath.pins`). With MAPS, the
maps of programs that run, the new programs use those, and only programs are left under STAGING.

On stdout it prints the instructions of lookup.c, a JSON list, for one stamped copy for each pod.

No kernel headers are needed. bcc is pointed (BCC_KERNEL_SOURCE) at a tree made of bpf/kbuild, which
stands in for the four internal headers that bcc asks for, and of the exported headers of
linux-libc-dev.

bcc rewrites map methods in the main text only, not in included files, so `source.expand` puts our
own includes in place first; `#line` keeps the file names in compiler messages.

Exit code 0, or 1 with the reason on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.datapath.source import (
    LOOKUP_PROGRAM,
    MAIN,
    MAPS,
    PROGRAMS,
    RING_BUFFERS,
    SOURCES,
    expand,
    relocatable_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def _load(staging: Path, maps: Path | None) -> list[int]:
    from bcc import BPF, lib  # heavy, and only ever in this process

    with _header_tree() as tree:
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        flags = [
            f'-DSS_PINS="{maps or staging / "maps"}"',
            "-Wno-macro-redefined",
            "-Wno-duplicate-decl-specifier",
        ]
        module: Any = BPF(text=expand(MAIN), cflags=flags)

    def pin(fd: int, name: str, kind: str = "programs") -> None:
        if lib.bpf_obj_pin(fd, str(staging / kind / name).encode()) < 0:
            raise OSError(f"{name} cannot be pinned under {staging}")

    for name in RING_BUFFERS:
        fd = lib.bpf_table_fd(module.module, name.encode())
        if maps is None:
            pin(fd, name, "maps")
            continue
        # bcc opens pinned maps, but ring buffers only new. The text names the map by its
        # descriptor, and is not loaded yet: so that number becomes the pinned one.
        pinned = lib.bpf_obj_get(str(maps / name).encode())
        if pinned < 0:
            raise OSError(f"{maps / name} cannot be opened")
        os.dup2(pinned, fd, inheritable=False)
        os.close(pinned)
    # ss_lookup too, so that the verifier sees it here; what serves a pod is a stamped copy.
    for name, (program_type, attach_type) in PROGRAMS.items():
        pin(module.load_func(name, program_type, attach_type=attach_type).fd, name)

    fds = {lib.bpf_table_fd(module.module, name.encode()): i for i, name in enumerate(MAPS)}
    return relocatable_text(module.dump_func(LOOKUP_PROGRAM), fds)


def main() -> int:
    """Load into the staging directory that is the first argument."""
    staging = Path(sys.argv[1])
    maps = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    for part in ("programs",) if maps else ("maps", "programs", "links"):
        (staging / part).mkdir()
    try:
        text = _load(staging, maps)
    except Exception as error:  # this process's last act: bcc raises bare Exception
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201  # the report
        return 1
    print(json.dumps(text))  # noqa: T201  # the answer
    return 0


if __name__ == "__main__":
    sys.exit(main())

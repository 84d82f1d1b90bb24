"""Become a program inside a namespace and a cgroup (NETNS CGROUP COMMAND...).

A process of its own, since both belong to the process that execs: the starter's threads are not
touched. Exit code 127 if the program is not there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from agent import netns


def main() -> int:
    """Enter and exec; returns only on failure."""
    netns_path, cgroup, *command = sys.argv[1:]
    (Path(cgroup) / "cgroup.procs").write_text("0")
    fd = netns.open_netns(Path(netns_path))
    netns.enter(fd)
    os.close(fd)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error.strerror}\n")
        return 127


if __name__ == "__main__":
    sys.exit(main())

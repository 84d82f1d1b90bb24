"""Where the sysctls of a network namespace can be written.

Whoever opens a file below NET sees the namespace that his thread is in (`agent.netns`). In a
container that is not privileged /proc/sys is read-only, so the node's own is mounted beside it.

Used by enroll.
"""

from __future__ import annotations

from pathlib import Path

OF_THE_NODE = Path("/host/proc/sys/net")  # deploy/chart mounts it there
NET = OF_THE_NODE if OF_THE_NODE.is_dir() else Path("/proc/sys/net")

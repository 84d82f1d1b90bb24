"""Become the agent with some capabilities and no others: CAPABILITIES agent ARGUMENTS..."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    capabilities, *arguments = sys.argv[1:]
    bound = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities.split(","))])
    program = [sys.executable, "-m", "agent.cli", *arguments]
    os.execvp("setpriv", ["setpriv", f"--bounding-set={bound}", *program])

"""Hold each pure module to its own tests: all of its lines and branches, by that file alone.

What another file happens to run of a module is no test of it, so every module is measured in a
process of its own. Which modules are pure says pyproject.toml. Exit code 1 names what is missing.

Run from the root of the project: python -m scripts.coverage_each [MODULE...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.modules import ROOT, path_of_tests, pure_modules, source_path


def measure(module: str) -> str:
    """Run the tests of one module and return what they leave out, empty if nothing."""
    tests = path_of_tests(module)
    if not tests.exists():
        return f"{tests.relative_to(ROOT)} is missing\n"
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        coverage = [sys.executable, "-m", "coverage"]
        common = [f"--data-file={data}", f"--include={source_path(module)}"]
        pytest = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(tests)]
        commands = (
            [*coverage, "run", "--branch", *common, *pytest],
            [*coverage, "report", *common, "--show-missing", "--fail-under=100"],
        )
        for command in commands:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return done.stdout + done.stderr
    return ""


def main() -> int:
    """Measure the modules that are named, or all."""
    modules = sys.argv[1:] or pure_modules()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        missing = list(pool.map(measure, modules))
    for module, report in zip(modules, missing, strict=True):
        sys.stdout.write(f"{'no ' if report else 'yes'} {module}\n{report}")
    return 1 if any(missing) else 0


if __name__ == "__main__":
    sys.exit(main())

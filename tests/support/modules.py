"""The modules of the project, and which of them are pure: pyproject.toml says so, once."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = "the core does no I/O and has no clock"


def module_name(path: Path) -> str:
    """Return the import name of a file: `agent/tunnel/pool.py` is agent.tunnel.pool."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_path(module: str) -> Path:
    """Return the file of a module that is not a package."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def path_of_tests(module: str) -> Path:
    """Return where the tests of a module are, whether they exist or not."""
    *packages, name = module.split(".")
    return ROOT.joinpath("tests", "unit", *packages, f"test_{name}.py")


def pure_modules() -> list[str]:
    """List the modules that the contract in pyproject.toml keeps from I/O and clocks."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = [found for found in contracts if found["name"] == CONTRACT]
    modules: list[str] = []
    for listed in contract["source_modules"]:
        package = ROOT.joinpath(*listed.split("."))
        paths = sorted(package.glob("[a-z]*.py")) if package.is_dir() else [source_path(listed)]
        modules += [module_name(path) for path in paths]
    return modules

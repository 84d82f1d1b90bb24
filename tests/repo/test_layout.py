"""The tree is as docs and tools expect it: names, docstrings, and tests that mirror the sources."""

from __future__ import annotations

import ast
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.modules import ROOT, module_name, path_of_tests, pure_modules, source_path

if TYPE_CHECKING:
    from pathlib import Path

TOP_FOLDERS = {".ci", "agent", "bpf", "cni", "deploy", "docs", "scripts", "tests"}
# Names that say nothing about what is inside.
NO_NAMES = re.compile(r"(.*_)?(common|data|helpers?|info|managers?|misc|shared|utils?)")
ENTRY_FILE_LINES = 150  # entry points and glue; logic is in bpf/include


def tracked(*patterns: str) -> list[Path]:
    """List the files of the project, new ones too."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def sources() -> list[Path]:
    return tracked("agent/*.py", "cni/*.py")


def test_folders_at_the_top_are_fixed() -> None:
    found = {path.relative_to(ROOT).parts for path in tracked()}
    assert {parts[0] for parts in found if len(parts) > 1} <= TOP_FOLDERS


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in tracked("*.py")
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_script_says_what_it_is_for() -> None:
    for path in tracked("*.sh", ".ci/run"):
        first, second, *_rest = path.read_text().splitlines()
        assert first.startswith("#!"), path
        assert second.startswith("# "), path


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [path for path in tracked("*.py") if NO_NAMES.fullmatch(path.stem)] == []


def test_every_package_is_one() -> None:
    folders = {path.parent for path in tracked("agent/*.py", "cni/*.py", "tests/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_unit_tests_mirror_the_sources() -> None:
    programs = tracked("cni/*.c")
    known = {path_of_tests(module_name(path)) for path in (*sources(), *programs)}
    strays = [path for path in tracked("tests/unit/*.py") if path.name.startswith("test_")]
    assert [str(path.relative_to(ROOT)) for path in strays if path not in known] == []


@pytest.mark.parametrize("module", pure_modules())
def test_pure_module_has_its_own_tests(module: str) -> None:
    assert source_path(module).exists()
    assert path_of_tests(module).exists()


def test_module_that_calls_itself_pure_is_kept_so() -> None:
    claims = re.compile(r"\bPure[.:]|\bpure\.|\bNo I/O\b")
    claimed = {
        module_name(path)
        for path in sources()
        if path.name != "__init__.py"
        and claims.search(ast.get_docstring(ast.parse(path.read_text())) or "")
    }
    assert claimed - set(pure_modules()) == set()


def test_only_netns_changes_the_namespace() -> None:
    def calls_setns(path: Path) -> bool:
        return any(
            isinstance(node, ast.Attribute) and node.attr == "setns"
            for node in ast.walk(ast.parse(path.read_text()))
        )

    assert [path for path in sources() if calls_setns(path)] == [ROOT / "agent/netns.py"]


def test_c_files_carry_their_license_and_hooks_are_short() -> None:
    for path in tracked("bpf/*.c", "bpf/*.h", "cni/*.c", "cni/*.h"):
        assert "SPDX-License-Identifier:" in path.read_text().splitlines()[0], path
    for path in (ROOT / "bpf").glob("*.c"):
        assert len(path.read_text().splitlines()) <= ENTRY_FILE_LINES, path

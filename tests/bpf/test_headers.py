"""The unit tests in C of the logic headers, bpf/tests/test_*.c, on this host."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from agent.datapath.source import SOURCES

if TYPE_CHECKING:
    from pathlib import Path

TESTS = sorted((SOURCES / "tests").glob("test_*.c"))
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]


@pytest.mark.parametrize("source", TESTS, ids=lambda path: path.stem)
def test_header_does_what_its_tests_in_c_say(source: Path, tmp_path: Path) -> None:
    program = tmp_path / source.stem
    includes = [f"-I{source.parent}", f"-I{SOURCES / 'include'}"]
    command = ["gcc", *FLAGS, *includes, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* checks$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("source", TESTS, ids=lambda path: path.stem)
def test_every_test_in_a_file_is_called(source: Path) -> None:
    text = source.read_text()
    written = re.findall(r"^static void (test_\w+)\(void\)$", text, re.MULTILINE)
    assert re.findall(r"^\t(test_\w+)\(\);$", text, re.MULTILINE) == written
    assert written

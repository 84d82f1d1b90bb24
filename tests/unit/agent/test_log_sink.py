"""A reader of the log that stops reading holds nobody up, and hears later what it missed."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest

from agent.log_sink import LogSink

F_SETPIPE_SZ = 1031  # fcntl.h
LINE = json.dumps({"message": "x" * 1000}) + "\n"


def test_lines_that_find_no_room_are_lost_and_counted() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    sink = LogSink(writer)
    for _ in range(100):
        assert sink.write(LINE) == len(LINE)  # and comes back
    found = os.read(reader, 1 << 20).decode()
    sink.write(LINE)
    found += os.read(reader, 1 << 20).decode()
    messages = [json.loads(line) for line in found.splitlines()]
    lost = [line["count"] for line in messages if line["message"] == "log lines lost"]
    assert sum(lost) + len(messages) - len(lost) == 101
    assert sum(lost) > 90
    os.close(reader)
    os.close(writer)


def test_line_that_is_written_while_a_line_is_written_is_lost_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finalizer says something, and the collector runs it where the sink itself is at work."""
    reader, writer = os.pipe()
    sink, written = LogSink(writer), os.write

    def write(fd: int, data: bytes) -> int:
        monkeypatch.undo()
        assert sink.write(LINE) == len(LINE)  # and comes back
        return written(fd, data)

    monkeypatch.setattr(os, "write", write)
    sink.write(LINE)
    sink.write(LINE)
    found = os.read(reader, 1 << 20).decode().splitlines()
    assert [json.loads(line).get("count") for line in found] == [None, 1, None]
    os.close(reader)
    os.close(writer)


def test_long_line_that_is_cut_is_ended_before_the_next() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    sink = LogSink(writer)
    long = json.dumps({"message": "y" * 6000}) + "\n"
    sink.write(long)
    sink.write(LINE)
    found = os.read(reader, 1 << 20)
    sink.write(LINE)
    found += os.read(reader, 1 << 20)
    words = [json.loads(line)["message"][0] for line in found.decode().splitlines()]
    assert words == ["y", "l", "x"]
    os.close(reader)
    os.close(writer)


def test_process_whose_log_nobody_reads_goes_on() -> None:
    program = (
        "import sys; from agent.log_sink import never_stall; never_stall();"
        "[sys.stderr.write('x' * 1000 + '\\n') for _ in range(1000)]; print('done')"
    )
    reader, writer = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", program],
        stderr=writer,
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
    )
    assert done.stdout == b"done\n"
    os.close(reader)
    os.close(writer)


def test_lines_that_a_full_disk_does_not_take_are_lost_and_counted() -> None:
    reader, writer = os.pipe()
    log = os.open("/dev/full", os.O_WRONLY)
    sink = LogSink(log)
    for _ in range(3):
        sink.write(LINE)
    os.dup2(writer, log)  # there is room again
    sink.write(LINE)
    messages = [json.loads(line) for line in os.read(reader, 1 << 20).splitlines()]
    assert messages[0] == {"message": "log lines lost", "count": 3}
    assert len(messages) == 2
    for fd in (reader, writer, log):
        os.close(fd)


def test_error_that_is_not_for_want_of_room_is_the_callers() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        LogSink(writer).write(LINE)
    os.close(writer)

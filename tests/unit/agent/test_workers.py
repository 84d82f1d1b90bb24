"""A worker process as the control side sees it: it answers, or it is ended."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
from pathlib import Path

import pytest

from agent import workers
from agent.model.policy import PolicyKey
from agent.tunnel import messages
from agent.workers import WorkerProcess
from tests.support.processes import descriptor_count


async def start() -> tuple[WorkerProcess, asyncio.Future[WorkerProcess]]:
    gone: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
    worker = WorkerProcess(
        gone.set_result, lambda _identity: None, lambda _worker, _uid: None, lambda _counts: None
    )
    async with asyncio.timeout(10):
        await worker.wait_in_force()
    return worker, gone


def test_worker_answers_when_all_is_in_force_and_ends_with_its_channel() -> None:
    async def check() -> None:
        worker, gone = await start()
        worker.stop()
        assert worker.process.returncode == 0
        assert not gone.done()

    asyncio.run(check())


def test_worker_that_is_gone_lets_nobody_wait() -> None:
    async def check() -> None:
        worker, gone = await start()
        worker.process.kill()
        await gone
        async with asyncio.timeout(workers.ANSWER_SECONDS / 2):
            await worker.wait_in_force()
            assert await worker.ask(messages.AskGauges, workers.ANSWER_SECONDS) is None
        worker.stop()

    asyncio.run(check())


def oom_score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score").read_text())


def test_kernel_that_is_short_of_memory_ends_a_worker_first() -> None:
    async def check() -> None:
        worker, _gone = await start()
        assert oom_score(worker.pid) > oom_score("self")
        worker.stop()

    asyncio.run(check())


def test_worker_that_misses_a_message_is_ended() -> None:
    async def check() -> None:
        worker, gone = await start()
        # Less than the message: the kernel refuses it, as it does when it has no memory for it.
        worker._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        keys = (PolicyKey("shop", f"policy-{n}", "AuthorizationPolicy") for n in range(1000))
        worker.send(messages.RemovePolicies(tuple(keys)))
        async with asyncio.timeout(10):
            assert await gone is worker
        worker.send(messages.Enforce())  # goes nowhere
        worker.stop()
        assert worker.process.returncode == -signal.SIGKILL

    asyncio.run(check())


def test_worker_that_takes_nothing_for_a_while_is_told_all_and_stops_nobody() -> None:
    """Far more than its socket holds, with a descriptor that is closed meanwhile."""

    async def check() -> None:
        worker, gone = await start()
        loop = asyncio.get_running_loop()
        os.kill(worker.pid, signal.SIGSTOP)
        began = loop.time()
        for number in range(5000):
            worker.send(messages.RemoveWorkload(f"uid-{number}"))
        revoked = os.memfd_create("revoked")
        worker.send(messages.PutRevoked(), [revoked])
        os.close(revoked)
        assert loop.time() - began < workers.SEND_SECONDS / 2
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await worker.wait_taken()
        os.kill(worker.pid, signal.SIGCONT)
        async with asyncio.timeout(10):
            await worker.wait_in_force()
        assert not gone.done()
        worker.stop()
        assert worker.process.returncode == 0

    asyncio.run(check())


def test_worker_that_takes_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        worker, gone = await start()
        before = descriptor_count(os.getpid())
        monkeypatch.setattr(workers, "SEND_SECONDS", 0.2)
        os.kill(worker.pid, signal.SIGSTOP)
        keys = tuple(PolicyKey("shop", f"policy-{n}", "AuthorizationPolicy") for n in range(1000))
        for _ in range(50):
            worker.send(messages.RemovePolicies(keys), [0])
        async with asyncio.timeout(10):
            await worker.wait_taken()
            assert await gone is worker
        worker.stop()
        assert worker.process.returncode == -signal.SIGKILL
        assert descriptor_count(os.getpid()) < before  # what waited for it is closed

    asyncio.run(check())


def test_worker_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        worker, gone = await start()
        monkeypatch.setattr(workers, "ANSWER_SECONDS", 0.2)
        os.kill(worker.pid, signal.SIGSTOP)
        async with asyncio.timeout(10):
            await worker.wait_in_force()
            assert await gone is worker
        worker.stop()
        assert worker.process.returncode == -signal.SIGKILL

    asyncio.run(check())


def wait_stopped(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WSTOPPED)


def test_worker_that_is_held_up_within_a_message_stalls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauges = messages.Gauges(1, (("buffered_bytes", (), 7),))
    packed = pickle.dumps(gauges)
    halves = [pickle.dumps(messages.Fragment(packed[:9], is_last=False))]
    halves.append(pickle.dumps(messages.Fragment(packed[9:], is_last=True)))
    held_up = tmp_path / "worker"
    held_up.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, socket, sys\n"
        "channel = socket.socket(fileno=int(sys.argv[-1]))\n"
        f"channel.send({halves[0]!r})\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        f"channel.send({halves[1]!r})\n"
        "while channel.recv(1000):\n"
        "    pass\n"
    )
    held_up.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(held_up))
    monkeypatch.setattr(workers, "SEND_SECONDS", 1.0)

    async def check() -> None:
        worker = WorkerProcess(
            lambda _worker: None,
            lambda _identity: None,
            lambda _worker, _uid: None,
            lambda _counts: None,
        )
        wait_stopped(worker.pid)
        # Whatever else the agent has to do.
        asyncio.get_running_loop().call_later(0.05, os.kill, worker.pid, signal.SIGCONT)
        assert await worker.ask(messages.AskGauges, workers.ANSWER_SECONDS) == gauges
        worker.stop()

    asyncio.run(check())

"""Messages to workers, over a real socket pair."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.errors import OutOfDescriptors
from agent.tunnel import messages
from tests.support.descriptors import descriptors_left
from tests.support.policies import authorization
from tests.support.processes import descriptor_count

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = messages.RemoveWorkload("x" * 500_000)  # in three datagrams, of which a socket holds two
NULL = Path("/dev/null")


@contextmanager
def pair(*, waits: bool) -> Iterator[tuple[messages.Outbox, messages.Inbox, socket.socket]]:
    """Make both ends of a socket, which may wait or not; beside them the one that is read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(waits)
        theirs.setblocking(waits)
        yield messages.Outbox(ours), messages.Inbox(theirs), theirs


def test_message_larger_than_a_datagram_arrives_whole_with_its_descriptors() -> None:
    blocks = [f"10.{high}.{low}.0/24" for high in range(200) for low in range(200)]
    large = authorization("large", "DENY", {"from": [{"source": {"ipBlocks": blocks}}]})
    told = messages.PutPolicies((large,))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        own = os.open("/dev/null", os.O_RDONLY)
        outbox = messages.Outbox(ours)
        sender = threading.Thread(target=outbox.put, args=(told, [own]))
        sender.start()
        inbox = messages.Inbox(theirs)
        assert inbox.receive() is None  # the rest is to come
        while (received := inbox.receive()) is None:
            pass
        sender.join()
        message, fds = received
        assert message == told
        assert len(fds) == 1
        assert os.path.sameopenfile(fds[0], own)
        for fd in (own, *fds):
            os.close(fd)
        outbox.put(messages.Ask(7))
        assert inbox.receive() == (messages.Ask(7), [])
        ours.close()
        with pytest.raises(ConnectionError):
            inbox.receive()


def test_descriptors_that_find_no_room_are_not_lost_in_silence() -> None:
    with pair(waits=True) as (outbox, inbox, _theirs):
        outbox.put(messages.Ask(7), [0, 1, 2])
        with descriptors_left(0), pytest.raises(OutOfDescriptors):
            inbox.receive()


def test_what_finds_no_room_is_kept_in_order_with_its_descriptors() -> None:
    before = descriptor_count(os.getpid())
    with pair(waits=False) as (outbox, inbox, _theirs):
        for number in range(3):
            with NULL.open() as file:
                outbox.put(LARGE, [file.fileno()])
                outbox.put(messages.Ask(number), [file.fileno()])
        assert len(outbox) == 6
        assert messages.Ask(2) in outbox
        assert messages.Ask(3) not in outbox
        came: list[messages.ToWorker | messages.FromWorker] = []
        while len(came) < 6:
            outbox.flush()
            received = inbox.receive()
            if received is None:
                continue
            message, (fd,) = received
            assert os.path.samestat(os.fstat(fd), NULL.stat())
            os.close(fd)
            came.append(message)
        assert not outbox
        assert came == [each for number in range(3) for each in (LARGE, messages.Ask(number))]
        with pytest.raises(BlockingIOError):
            inbox.receive()
    assert descriptor_count(os.getpid()) == before


def test_what_is_kept_for_a_reader_that_goes_is_forgotten() -> None:
    before = descriptor_count(os.getpid())
    with pair(waits=False) as (outbox, _inbox, theirs):
        outbox.put(LARGE, [0])
        outbox.put(messages.Ask(1), [0])
        theirs.close()
        with pytest.raises(ConnectionError):
            outbox.flush()
        assert not outbox
        with pytest.raises(BrokenPipeError):
            outbox.put(messages.Ask(2))
        assert not outbox
    assert descriptor_count(os.getpid()) == before


def test_message_whose_descriptors_cannot_be_kept_is_refused() -> None:
    with pair(waits=False) as (outbox, _inbox, _theirs):
        with descriptors_left(1), pytest.raises(OSError, match="Too many open files"):
            outbox.put(LARGE, [0, 1])
        assert not outbox

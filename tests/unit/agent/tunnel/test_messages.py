"""Messages to workers, over a real socket pair."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from agent.errors import OutOfDescriptors
from agent.tunnel import messages
from tests.support.descriptors import descriptors_left
from tests.support.policies import authorization


def test_message_larger_than_a_datagram_arrives_whole_with_its_descriptors() -> None:
    blocks = [f"10.{high}.{low}.0/24" for high in range(200) for low in range(200)]
    large = authorization("large", "DENY", {"from": [{"source": {"ipBlocks": blocks}}]})
    told = messages.PutPolicies((large,))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        own = os.open("/dev/null", os.O_RDONLY)
        sender = threading.Thread(target=messages.send, args=(ours, told, [own]))
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
        messages.send(ours, messages.Ask(7))
        assert inbox.receive() == (messages.Ask(7), [])
        ours.close()
        with pytest.raises(ConnectionError):
            inbox.receive()


def test_descriptors_that_find_no_room_are_not_lost_in_silence() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        messages.send(ours, messages.Ask(7), [0, 1, 2])
        with descriptors_left(0), pytest.raises(OutOfDescriptors):
            messages.Inbox(theirs).receive()

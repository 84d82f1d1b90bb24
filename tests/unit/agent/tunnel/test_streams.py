"""The stream table is whole: every state and input is either a step or an error."""

from __future__ import annotations

import itertools

from agent.tunnel.streams import (
    MAY_RECEIVE,
    MAY_SEND,
    TRANSITIONS,
    Stream,
    StreamInput,
    StreamState,
)


def test_every_pair_is_decided() -> None:
    for state, step in itertools.product(StreamState, StreamInput):
        allowed = {
            StreamInput.SEND_END: state in MAY_SEND,
            StreamInput.RECEIVE_END: state in MAY_RECEIVE,
            StreamInput.RESET: state is not StreamState.CLOSED,
        }[step]
        assert ((state, step) in TRANSITIONS) == allowed


def test_each_half_ends_once() -> None:
    for (state, step), following in TRANSITIONS.items():
        if step is StreamInput.SEND_END:
            assert following not in MAY_SEND
            assert (following in MAY_RECEIVE) == (state in MAY_RECEIVE)
        if step is StreamInput.RECEIVE_END:
            assert following not in MAY_RECEIVE
            assert (following in MAY_SEND) == (state in MAY_SEND)


def test_new_stream_is_open_with_the_windows_of_its_time() -> None:
    stream = Stream(send_window=10, receive_window=20)
    assert stream.state is StreamState.OPEN
    assert (stream.send_window, stream.receive_window, stream.consumed) == (10, 20, 0)
    assert not stream.has_response


def test_stream_knows_which_halves_are_open() -> None:
    stream = Stream(1, 1)
    assert (stream.may_send, stream.may_receive) == (True, True)
    stream.advance(StreamInput.SEND_END)
    assert (stream.may_send, stream.may_receive) == (False, True)
    stream.advance(StreamInput.RECEIVE_END)
    assert (stream.state, stream.may_receive) == (StreamState.CLOSED, False)

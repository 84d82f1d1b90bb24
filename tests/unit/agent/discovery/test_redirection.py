"""The annotation of a captured pod: when it is written, and when once more."""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from agent.discovery import redirection
from agent.discovery.redirection import RedirectionWriter
from agent.discovery.translate import REDIRECTION
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.discovery.api import Api

ENOUGH_SECONDS = 10.0


class Patches:
    """An API server of which only the order of patches is known."""

    def __init__(self) -> None:
        self._words: queue.Queue[str | None] = queue.Queue()

    def patch(self, _path: str, body: Any) -> None:
        self._words.put(body["metadata"]["annotations"][REDIRECTION])

    def next(self) -> str | None:
        return self._words.get(timeout=ENOUGH_SECONDS)


@pytest.fixture
def patches() -> Patches:
    return Patches()


@pytest.fixture
def writer(patches: Patches) -> Iterator[RedirectionWriter]:
    made = RedirectionWriter(cast("Api", patches))
    made.start()
    yield made
    made.close(ENOUGH_SECONDS)
    made.join(ENOUGH_SECONDS)
    assert not made.is_alive()


def say(writer: RedirectionWriter, patches: Patches, word: str | None) -> None:
    writer.publish("u", "shop", "cart", word)
    assert patches.next() == word
    wait_until(lambda: not writer._orders)


def test_word_that_somebody_took_away_is_written_once_more(
    writer: RedirectionWriter, patches: Patches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redirection, "LATENESS_SECONDS", 0.0)
    for _ in range(3):
        say(writer, patches, "enabled")


def test_state_may_be_late_and_what_differs_waits_for_nothing(
    writer: RedirectionWriter, patches: Patches
) -> None:
    say(writer, patches, "enabled")
    writer.publish("u", "shop", "cart", "enabled")
    assert writer._orders["u"].due > time.monotonic()
    say(writer, patches, None)
    say(writer, patches, "enabled")


def test_nobody_waits_at_the_end_for_what_is_written_already(
    writer: RedirectionWriter, patches: Patches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redirection, "LATENESS_SECONDS", ENOUGH_SECONDS)
    say(writer, patches, "enabled")
    writer.publish("u", "shop", "cart", "enabled")
    began = time.monotonic()
    writer.close(ENOUGH_SECONDS)
    assert time.monotonic() - began < ENOUGH_SECONDS / 2

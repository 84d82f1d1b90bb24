"""What an agent that ends makes of the API server's answers about its own DaemonSet."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from agent.discovery import kubernetes
from agent.discovery.api import Api, StatusError
from agent.discovery.kubernetes import KubernetesSource
from agent.errors import KubernetesError

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE, GOES, AWAY = "here", "goes", "away"
Answer = str | int  # or the status of an error


class Answering(Api):
    """An API server that gives these answers, the last of them again and again."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self.asked = 0

    @contextmanager
    def get(self, path: str, *_arguments: object) -> Iterator[io.BytesIO]:  # type: ignore[override]  # enough of it
        assert path == "/apis/apps/v1/namespaces/system/daemonsets/agents"
        answer = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        if answer == AWAY:
            raise KubernetesError("the API server cannot be reached")
        if isinstance(answer, int):
            raise StatusError("no", answer)
        metadata = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if answer == GOES else {}
        yield io.BytesIO(json.dumps({"metadata": metadata}).encode())


def is_withdrawn(api: Answering) -> bool:
    source = KubernetesSource(api, resources=(), daemonset=("system", "agents"))

    async def ask() -> bool:
        async with asyncio.timeout(10):
            return await source.is_withdrawn()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("answers", "is_gone"),
    [
        ([HERE], False),
        ([GOES], True),
        ([AWAY], False),
        ([500], False),
        ([401, HERE], False),
        ([404, HERE], False),
        ([401, 401, 401, 500], False),
        ([401, AWAY], False),
        ([403, HERE], False),
        ([403, 401, GOES], True),
    ],
)
def test_nobody_believes_one_answer_that_all_has_gone(
    answers: list[Answer], is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "ASK_AGAIN_SECONDS", 0.0)
    api = Answering(answers)
    assert is_withdrawn(api) is is_gone
    assert api.asked == len(answers)


@pytest.mark.parametrize(
    ("answers", "is_gone"),
    [
        ([401], True),
        ([404], True),
        ([404, 401], True),
        ([403, 403, 401], True),
        ([401, 403, 401], True),
        ([403], False),
        ([401, 403], False),
    ],
)
def test_what_is_said_for_a_while_is_believed_but_for_a_refusal(
    answers: list[Answer], is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "ASK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(kubernetes, "BELIEVED_SECONDS", 0.1)
    monkeypatch.setattr(kubernetes, "REMEMBERED_SECONDS", 0.5)
    api = Answering(answers)
    assert is_withdrawn(api) is is_gone
    assert api.asked > len(answers)

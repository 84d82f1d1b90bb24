"""What is wrong with a pod is an Event on it, written with the agent's own rights."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from agent.discovery.api import Api
from agent.discovery.occurrences import BURST_WRITES, Occurrence
from agent.discovery.pod_events import NOTE_BYTES, PodEventWriter
from tests.cluster.test_rights import installed, token_of
from tests.support.cluster_objects import Body, namespace, pod
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.api_server import ApiServer

__all__ = ["installed"]
SPACE = "events"


@pytest.fixture
def broken(installed: ApiServer) -> Iterator[Occurrence]:
    """Return a problem of a pod that is there."""
    installed.apply(namespace(SPACE))
    body = pod(f"{SPACE}/broken", "10.11.0.1")
    uid = installed.apply(body)["metadata"]["uid"]
    yield Occurrence(SPACE, "broken", uid, "EnrollFailed", "port 15008 is in use")
    installed.delete(body)
    installed.must("DELETE", f"/apis/events.k8s.io/v1/namespaces/{SPACE}/events")


@pytest.fixture
def writer(installed: ApiServer) -> Iterator[PodEventWriter]:
    made = PodEventWriter(Api(installed.configuration(token_of(installed, "sidestep-agent"))))
    made.start()
    yield made
    made.close()
    made.join(20.0)
    assert not made.is_alive()


def events_of(server: ApiServer, uid: str) -> list[Body]:
    # As `kubectl describe pod` asks.
    path = f"/api/v1/namespaces/{SPACE}/events?fieldSelector=involvedObject.uid={uid}"
    found: list[Body] = server.must("GET", path)["items"]
    return found


def counted(server: ApiServer, uid: str) -> list[int]:
    return [(event.get("series") or {"count": 1})["count"] for event in events_of(server, uid)]


def test_problem_is_one_event_that_counts(
    installed: ApiServer, broken: Occurrence, writer: PodEventWriter
) -> None:
    writer.report(broken)
    wait_until(lambda: counted(installed, broken.uid) == [1])
    (event,) = events_of(installed, broken.uid)
    assert (event["type"], event["reason"]) == ("Warning", "EnrollFailed")
    assert event["message"] == "port 15008 is in use"
    assert event["reportingComponent"] == "sidestep.io/agent"
    for _ in range(5):
        writer.report(broken)
    wait_until(lambda: counted(installed, broken.uid) == [6])


def test_event_that_was_deleted_is_made_anew(
    installed: ApiServer, broken: Occurrence, writer: PodEventWriter
) -> None:
    writer.report(broken)
    wait_until(lambda: counted(installed, broken.uid) == [1])
    installed.must("DELETE", f"/apis/events.k8s.io/v1/namespaces/{SPACE}/events")
    writer.report(broken)
    wait_until(lambda: counted(installed, broken.uid) == [2])


def test_pod_with_ever_new_problems_is_no_flood(
    installed: ApiServer, broken: Occurrence, writer: PodEventWriter
) -> None:
    for number in range(4 * BURST_WRITES):
        writer.report(replace(broken, note=f"problem {number}"))
    other = replace(broken, uid="another-pod", pod="other", note="é" * NOTE_BYTES)
    writer.report(other)
    wait_until(lambda: events_of(installed, "another-pod"))
    assert len(events_of(installed, broken.uid)) == BURST_WRITES


def test_server_that_is_away_hears_of_it_later(
    installed: ApiServer, broken: Occurrence, writer: PodEventWriter
) -> None:
    installed.kill()
    for _ in range(3):
        writer.report(broken)
    installed.start()
    wait_until(lambda: sum(counted(installed, broken.uid)) == 3)


def test_what_the_server_refuses_is_dropped_and_said_once(
    installed: ApiServer,
    broken: Occurrence,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.discovery.pod_events.FIRST_RETRY_SECONDS", 0.05)
    # The CA's account may write no Events.
    writer = PodEventWriter(Api(installed.configuration(token_of(installed, "sidestep-ca"))))
    writer.start()

    def warnings() -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.levelno == logging.WARNING]

    try:
        writer.report(broken)
        wait_until(warnings)
        writer.report(broken)
        wait_until(lambda: writer._occurrences.due(0.0) is None)
    finally:
        writer.close()
        writer.join(20.0)
    assert len(warnings()) == 1
    assert "403" in vars(warnings()[0])["detail"]
    assert events_of(installed, broken.uid) == []

"""The CA's key in a Secret."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from agent.discovery.secret import SecretStore
from agent.errors import ConfigError, KubernetesError
from agent.identity.custody import Stage, open_authority, rotate_root
from tests.support.kube_api import KubeApi, serving

if TYPE_CHECKING:
    from collections.abc import Iterator


PATH = "/api/v1/namespaces/sidestep-system/secrets/ca"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def api() -> KubeApi:
    return KubeApi()


@pytest.fixture
def store(api: KubeApi) -> Iterator[SecretStore]:
    from kubernetes import client as library

    with serving(api) as connected:
        yield SecretStore(library.CoreV1Api(connected), "sidestep-system", "ca")


def test_root_is_made_once_and_kept_in_the_secret(api: KubeApi, store: SecretStore) -> None:
    first, second = (open_authority(store, "cluster.local") for _ in range(2))
    assert first.certificate == second.certificate
    data = api.objects[PATH]["data"]
    assert sorted(data) == ["ca-cert.pem", "ca-key.pem", "root-cert.pem"]
    assert base64.b64decode(data["ca-cert.pem"]).startswith(b"-----BEGIN CERTIFICATE")


def test_root_is_replaced_in_the_secret_each_stage_in_one_write(
    api: KubeApi, store: SecretStore
) -> None:
    old = open_authority(store, "cluster.local").certificate
    stages: list[Stage] = ["trust", "sign", "finish"]
    for days, stage in enumerate(stages):
        api.requests.clear()
        rotate_root(store, stage, "cluster.local", timedelta(days=1), NOW + timedelta(days=days))
        assert [request for request in api.requests if "PUT" in request] == [f"PUT {PATH}"]
    authority = open_authority(store, "cluster.local")
    assert authority.roots == [authority.certificate]
    assert authority.certificate != old


def test_write_of_somebody_else_in_between_is_refused(
    api: KubeApi, store: SecretStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_authority(store, "cluster.local")
    find = store._find

    def find_and_be_late() -> object:
        found = find()
        api.put(PATH, api.objects[PATH])
        return found

    monkeypatch.setattr(store, "_find", find_and_be_late)
    with pytest.raises(KubernetesError, match="written by somebody else"):
        store.write({"ca-key.pem": b"x"})
    monkeypatch.setattr(store, "_find", lambda: None)  # it was not there a moment ago
    with pytest.raises(KubernetesError, match="written by somebody else"):
        store.write({"ca-key.pem": b"x"})


def test_api_that_fails_is_told_without_any_content(api: KubeApi, store: SecretStore) -> None:
    api.is_broken = True
    with pytest.raises(KubernetesError, match="sidestep-system/ca cannot be read: 500"):
        open_authority(store, "cluster.local")


def test_changes_end_at_once_when_stopped(store: SecretStore) -> None:
    async def follow() -> int:
        stop = asyncio.Event()
        count = 0
        async with asyncio.timeout(5):
            async for _ in store.changes(stop):
                count += 1
                stop.set()
        return count

    assert asyncio.run(follow()) == 1


@pytest.mark.parametrize("place", ["ca", "/ca", "a/", "a/b/c"])
def test_place_that_is_no_secret_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="NAMESPACE/NAME"):
        SecretStore.open(place)

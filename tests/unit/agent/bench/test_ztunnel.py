"""What a ztunnel is told: its settings, who is in the mesh, and the pod that it serves."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.bench import servers, ztunnel
from agent.lab.cluster import LabPod, parse_cluster

NODE = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "east"}}
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "client", "namespace": "plain"},
    "spec": {"nodeName": "east", "serviceAccountName": "account"},
}


@pytest.fixture
def pod() -> LabPod:
    (found,) = parse_cluster([NODE, POD], "file", "lab").pods
    return found


def test_state_lists_the_pods_as_workloads_that_speak_hbone(pod: LabPod) -> None:
    state = ztunnel.build_state([pod], "cluster.local")
    (workload,) = state["workloads"]
    assert workload["workloadIps"] == [str(pod.address4)]
    assert (workload["serviceAccount"], workload["node"]) == ("account", "east")
    assert (workload["protocol"], workload["trustDomain"]) == ("HBONE", "cluster.local")
    assert state["services"] == state["policies"] == []


def test_settings_name_the_labs_authority_and_the_socket(pod: LabPod) -> None:
    authority = ztunnel.Authority("10.0.0.1:15012", "ca.lab", Path("roots"), Path("token"))
    settings = ztunnel.environment(pod, Path("state"), Path("zds"), authority)
    assert settings["CA_ADDRESS"] == "https://10.0.0.1:15012"
    assert settings["ALT_CA_HOSTNAME"] == "ca.lab"
    assert (settings["CA_ROOT_CA"], settings["AUTH_TOKEN"]) == ("roots", "token")
    assert (settings["LOCAL_XDS_PATH"], settings["INPOD_UDS"]) == ("state", "zds")
    assert settings["NODE_NAME"] == "east"


def test_capture_leaves_out_what_the_ztunnel_itself_dials() -> None:
    rules = ztunnel.build_capture("10.0.0.2", (7000, 7080))
    assert (
        "meta mark != 1337 ip daddr 10.0.0.2 tcp dport { 7000, 7080 } redirect to :15001" in rules
    )


def test_pod_is_told_as_zds_has_it(pod: LabPod) -> None:
    uid = pod.uid.encode()
    info = b"\x0a\x06client\x12\x05plain\x1a\x07account"
    add = b"\x0a" + bytes([len(uid)]) + uid + b"\x12" + bytes([len(info)]) + info
    assert ztunnel.build_add(pod) == b"\x0a" + bytes([len(add)]) + add


@pytest.mark.parametrize("answer", [ztunnel.ACK, b"\x0a\x04\x0a\x02no"])
def test_pod_is_handed_over_with_its_namespace(pod: LabPod, tmp_path: Path, answer: bytes) -> None:
    with (
        servers.listen_for_ztunnel(tmp_path / "zds") as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs,
        ThreadPoolExecutor(1) as pool,
        (tmp_path / "netns").open("w") as netns,
    ):
        theirs.connect(str(tmp_path / "zds"))
        theirs.send(b"\x08\x01")  # hello
        handed = pool.submit(servers.hand_over, listener, pod, netns.fileno())
        message, fds, _flags, _address = socket.recv_fds(theirs, 1024, 1)
        assert message == ztunnel.build_add(pod)
        assert os.path.sameopenfile(fds[0], netns.fileno())
        os.close(fds[0])
        theirs.send(answer)
        if answer == ztunnel.ACK:
            assert theirs.recv(1024) == ztunnel.SNAPSHOT_SENT
            theirs.send(answer)
            handed.result().close()
        else:
            with pytest.raises(OSError, match="refuses"):
                handed.result()

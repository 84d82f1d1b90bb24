"""The plugin itself: a static program, run as a runtime runs it, against a real socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.installer import SHIM
from cni.protocol import MAGIC, SUCCESS, CniError, Code, build_error, parse_request
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POD = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=1-2"
# Odd on purpose: whoever builds it anew would write it otherwise.
RESULT = '{ "ips":[ {"address" : "10.0.0.5\\u002f24"}],\n "cniVersion": "1.0.0", "x": 1.50e+0}'
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    subprocess.run([ROOT / "scripts/build_shim.sh"], check=True)


def configuration(directory: Path, previous: str | None = RESULT, **changes: Any) -> str:
    record = directory / "installed"
    record.touch()
    members = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "type": "sidestep",
        "agentSocket": str(directory / "cni.sock"),
        "installedRecord": str(record),
        "excludeNamespaces": ["kube-system", "spared"],
    } | changes
    text = json.dumps(members)
    return text if previous is None else f'{text[:-1]}, "prevResult" : {previous} }}'


def run(
    text: str, command: str | None = "ADD", arguments: str = POD
) -> subprocess.CompletedProcess[str]:
    environment = {"CNI_ARGS": arguments, "CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/a"}
    if command is not None:
        environment["CNI_COMMAND"] = command
    return subprocess.run(
        [SHIM], input=text, env=environment, capture_output=True, text=True, timeout=20, check=False
    )


@contextmanager
def answering(directory: Path, answer: bytes) -> Iterator[list[bytes]]:
    """Answer requests as the agent does, and collect them."""
    requests: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "cni.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                request = bytearray()
                while part := connection.recv(65536):
                    request += part
                requests.append(bytes(request))
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_plugin_needs_nothing_of_the_host_and_is_small() -> None:
    assert SHIM.stat().st_size < 100 * 1024
    described = subprocess.run(["readelf", "-ld", SHIM], check=True, capture_output=True, text=True)
    assert "INTERP" not in described.stdout
    assert "NEEDED" not in described.stdout


def test_agent_gets_the_request_and_the_result_is_passed_on_to_the_byte(tmp_path: Path) -> None:
    text = configuration(tmp_path)
    with answering(tmp_path, SUCCESS) as requests:
        done = run(text)
    assert (done.returncode, done.stdout) == (0, f"{RESULT}\n")
    (request,) = requests
    assert request.startswith(MAGIC)
    assert request.endswith(text.encode())
    found = parse_request(request)
    assert (found.command, found.namespace, found.name, found.uid, found.netns) == (
        "ADD", "shop", "cart-0", "1-2", "/run/netns/a",
    )  # fmt: skip


def test_error_of_the_agent_is_the_plugins(tmp_path: Path) -> None:
    refusal = build_error(CniError(Code.NOT_CAPTURED, "it is gone"), "1.0.0")
    with answering(tmp_path, refusal):
        done = run(configuration(tmp_path), "CHECK")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == 100


@pytest.mark.parametrize("command", ["CHECK", "STATUS", "DEL", "GC"])
def test_other_commands_print_nothing_when_they_succeed(tmp_path: Path, command: str) -> None:
    with answering(tmp_path, SUCCESS) as requests:
        done = run(configuration(tmp_path), command)
    assert (done.returncode, done.stdout, len(requests)) == (0, "", 1)


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("STATUS", 50)])
@pytest.mark.parametrize("answer", [None, b"", b"0", b"1\n", b"nonsense"])
def test_without_an_answer_nothing_passes(
    tmp_path: Path, command: str, code: int, answer: bytes | None
) -> None:
    text = configuration(tmp_path)
    if answer is None:
        done = run(text, command)
    else:
        with answering(tmp_path, answer):
            done = run(text, command)
    assert done.returncode == 1
    error = json.loads(done.stdout)
    assert (error["cniVersion"], error["code"]) == ("1.0.0", code)
    assert str(tmp_path / "cni.sock") in error["msg"]
    assert "DaemonSet sidestep-agent" in error["msg"]


@pytest.mark.parametrize("command", ["DEL", "GC"])
@pytest.mark.parametrize("answer", [None, b"", b'1\n{"code": 11}'])
def test_deleting_succeeds_whatever_comes_of_it(
    tmp_path: Path, command: str, answer: bytes | None
) -> None:
    text = configuration(tmp_path)
    if answer is None:
        done = run(text, command)
    else:
        with answering(tmp_path, answer):
            done = run(text, command)
    assert (done.returncode, done.stdout) == (0, "")


def test_agent_that_does_not_answer_keeps_no_deletion_for_long(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "cni.sock"))
        silent.listen()
        assert run(configuration(tmp_path), "DEL").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        POD.replace("shop", "kube-system"),
        "K8S_POD_NAMESPACE=spared",
        "",
        "IgnoreUnknown=1;XK8S_POD_NAMESPACE=shop",
    ],
)
def test_excluded_namespaces_and_what_is_no_pod_need_no_agent(
    tmp_path: Path, arguments: str
) -> None:
    done = run(configuration(tmp_path), arguments=arguments)
    assert (done.returncode, done.stdout) == (0, f"{RESULT}\n")


@pytest.mark.parametrize("namespace", ["spare", "spared2", "spared;x", '"spared"'])
def test_namespace_is_excluded_by_its_whole_name(tmp_path: Path, namespace: str) -> None:
    done = run(configuration(tmp_path), arguments=f"K8S_POD_NAMESPACE={namespace}")
    assert done.returncode == (0 if namespace == "spared;x" else 1)


def test_uninstalled_plugin_passes_everything(tmp_path: Path) -> None:
    text = configuration(tmp_path)
    (tmp_path / "installed").unlink()
    assert run(text).stdout == f"{RESULT}\n"
    assert run(text, "STATUS").returncode == 0
    # The directory with the record may be gone, or something else by now.
    elsewhere = configuration(tmp_path, installedRecord=str(tmp_path / "installed/installed"))
    assert run(elsewhere).stdout == f"{RESULT}\n"
    unreadable = configuration(tmp_path, installedRecord=str(tmp_path / ("x" * 300)))
    assert run(unreadable).returncode == 1


@pytest.mark.parametrize(
    ("text", "command", "code", "message"),
    [
        ("{", "ADD", 6, "not a JSON object"),
        ("[]", "ADD", 6, "not a JSON object"),
        (" " * (1 << 20), "ADD", 6, "larger than 1 MiB"),
        ("{}", "ADD", 7, "there is no prevResult"),
        ('{"prevResult": null}', "ADD", 7, "there is no prevResult"),
        ('{"prevResult": {}}', "ADD", 7, "agentSocket is missing"),
        ('{"prevResult": {}, "agentSocket": 1}', "ADD", 7, "agentSocket is missing"),
        ("{}", 'FLY"', 4, "CNI_COMMAND is not known: FLY"),
        ("{}", None, 4, "CNI_COMMAND is missing"),
    ],
)
def test_request_that_cannot_be_used_says_why(
    text: str, command: str | None, code: int, message: str
) -> None:
    done = run(text, command)
    assert done.returncode == 1
    error = json.loads(done.stdout)
    assert error["code"] == code
    assert message in error["msg"]


@pytest.mark.parametrize("text", ['{"cniVersion": "1.1.0"}', "", "{"])
def test_version_is_told_without_an_agent(text: str) -> None:
    done = run(text, "VERSION")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


def test_socket_with_too_long_a_name_is_an_error_and_no_overflow(tmp_path: Path) -> None:
    assert run(configuration(tmp_path, agentSocket="/x" * 200)).returncode == 1


# -- json.h --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a program that says what json.h finds."""
    program = tmp_path_factory.mktemp("json") / "read_json"
    source = ROOT / "tests/unit/cni/read_json.c"
    subprocess.run(
        ["gcc", *FLAGS, f"-I{ROOT / 'cni'}", str(source), "-o", str(program)], check=True
    )
    return program


def read(reader: Path, *lines: tuple[str, str]) -> list[str]:
    text = "".join(f"{name}\t{line}\n" for name, line in lines)
    done = subprocess.run(
        [reader], input=text.encode(), capture_output=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().splitlines()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(st.lists(JSON, min_size=1, max_size=20))
def test_members_and_items_are_found_as_they_are(reader: Path, values: list[Any]) -> None:
    lines = []
    expected = []
    for value in values:
        text = json.dumps(value)
        lines += [("a", f'{{"b": [{text}], "a" : {text} , "c":{text}}}'), ("", f"[1 , {text}]")]
        expected += [text, f"<1><{text}>"]
    assert read(reader, *lines) == expected


PLAIN = st.recursive(
    st.sampled_from([None, True, False, 0, -1, 20, 1.5, -2e300, "", "a", "b c"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=12,
)
SLIP = st.tuples(PLAIN, st.integers(min_value=0), st.sampled_from('"{}[],:0-.etn '))


@settings(deadline=None, max_examples=20)
@given(st.lists(SLIP, min_size=50, max_size=50))
def test_what_is_no_json_is_known(reader: Path, slips: list[tuple[Any, int, str]]) -> None:
    broken = []
    for value, where, character in slips:
        text = json.dumps(value)
        at = where % (len(text) + 1)
        broken.append(text[:at] + character + text[at + 1 :])
    found = read(reader, *(("a", text) for text in broken))
    assert [line != "invalid" for line in found] == list(map(_is_json, broken))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_of_several_members_the_last_counts_and_absent_ones_are_none(reader: Path) -> None:
    found = read(reader, ("a", '{"a": 1, "a": 2}'), ("x", '{"a": 1}'), ("a", "[1]"), ("", "{}"))
    assert found == ["2", "", "", ""]


def test_depth_is_bounded(reader: Path) -> None:
    deep = ["[" * depth + "]" * depth for depth in (64, 65, 100_000)]
    found = read(reader, *(("a", text) for text in deep))
    assert found == ["", "invalid", "invalid"]

"""A containerd of our own, spoken to as a kubelet does: CRI over gRPC.

Root, state, sockets and plugins are below one directory, and the image of sandboxes is made here: a
static program that waits. Network is that of the host's namespace, by a bridge of our own.

Messages are written field by field (runtime/v1/api.proto): a generated module would need the
generator.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from agent import netlink, netns
from agent.protobuf import build_bytes, build_number, parse_fields
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

PAUSE_IMAGE = "sidestep.test/pause:1"
PAUSE_SOURCE = "#include <unistd.h>\nint main(void)\n{\n\twhile (1)\n\t\tpause();\n}\n"
DEBIAN_PLUGINS = Path("/usr/lib/cni")
BRIDGE = "ss-cni0"
CALL_SECONDS = 60.0
Message = dict[int, list[Any]]


def _write(number: int, value: bytes | str | int) -> bytes:
    if isinstance(value, int):
        return build_number(number, value)
    return build_bytes(number, value.encode() if isinstance(value, str) else value)


def _read(data: bytes) -> Message:
    """Read the fields of a message by number; what is nested stays bytes."""
    found: Message = {}
    for number, value in parse_fields(data):
        found.setdefault(number, []).append(value)
    return found


@dataclass(frozen=True)
class Sandbox:
    """A sandbox as the runtime describes it."""

    id: str
    pid: int
    netns: Path
    addresses: tuple[str, ...]


@dataclass
class Containerd:
    """One containerd; `end` takes away all that it made."""

    directory: Path
    running: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.networks = self._make("net.d")
        self.plugins = self._make("bin")
        for name in ("bridge", "host-local", "loopback"):
            (self.plugins / name).symlink_to(DEBIAN_PLUGINS / name)
        # runc makes it in each hierarchy of cgroups.
        self.cgroup = f"/sidestep-cri-{os.getpid()}"
        # One of them, where an agent looks for the pods' processes.
        self.hierarchy = next(
            found for name in ("pids", "") if (found := Path("/sys/fs/cgroup", name)).is_dir()
        ) / self.cgroup.removeprefix("/")
        self.hierarchy.mkdir()
        self.socket = self.directory / "c.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def _make(self, name: str) -> Path:
        made = self.directory / name
        made.mkdir()
        return made

    def network(self, **changes: Any) -> dict[str, Any]:
        """Describe a bridge with addresses of this host's."""
        subnet = {"subnet": "10.98.0.0/24"} | changes
        ipam = {"type": "host-local", "dataDir": str(self.directory / "ipam"), "ranges": [[subnet]]}
        bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": False, "ipam": ipam}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}

    def write_network(self, **changes: Any) -> Path:
        """Give the node its network, as a cluster's CNI does, and return the file."""
        path = self.networks / "10-pods.conflist"
        path.write_text(json.dumps(self.network(**changes), indent=2) + "\n")
        return path

    def start(self) -> None:
        """Start, and wait until it has the image of sandboxes."""
        config = self.directory / "config.toml"
        config.write_text(
            f"""version = 2
root = "{self.directory}/root"
state = "{self.directory}/state"
[grpc]
address = "{self.socket}"
[ttrpc]
address = "{self.directory}/t.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{self.directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
netns_mounts_under_state_dir = true
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{self.plugins}"
conf_dir = "{self.networks}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{self.directory}/runc"
"""
        )
        with (self.directory / "containerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["containerd", "--config", config], stdout=log, stderr=log
            )
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")
        grpc.channel_ready_future(self._channel).result(30)
        self._import_pause()

    def _import_pause(self) -> None:
        source = self.directory / "pause.c"
        source.write_text(PAUSE_SOURCE)
        program = self.directory / "pause"
        subprocess.run(["musl-gcc", "-static", "-s", "-o", program, source], check=True)
        archive = self.directory / "pause.tar"
        archive.write_bytes(_image(program.read_bytes()))
        command = ["ctr", "-a", str(self.socket), "-n", "k8s.io", "images", "import"]
        subprocess.run(
            [*command, "--snapshotter", "native", archive], check=True, capture_output=True
        )

    def _call(self, method: str, request: bytes) -> Message:
        path = f"/runtime.v1.RuntimeService/{method}"
        call = self._channel.unary_unary(path, lambda each: each, lambda each: each)
        answer: bytes = call(request, timeout=CALL_SECONDS)
        return _read(answer)

    def is_network_ready(self) -> bool:
        """Tell what the kubelet would make the node's condition of."""
        (status,) = self._call("Status", b"")[1]
        for condition in map(_read, _read(status)[1]):
            if condition[1] == [b"NetworkReady"]:
                return condition.get(2) == [1]
        raise AssertionError("the runtime says nothing of its network")

    def run(self, space: str, name: str, uid: str, attempt: int = 0) -> Sandbox:
        """Start a pod's sandbox (grpc.RpcError)."""
        metadata = _write(1, name) + _write(2, uid) + _write(3, space) + _write(4, attempt)
        linux = _write(1, f"{self.cgroup}/pod{uid}")
        config = _write(1, metadata) + _write(2, name) + _write(8, linux)
        answer = self._call("RunPodSandbox", _write(1, config))
        (found,) = answer[1]
        self.running.append(found.decode())
        return self.describe(found.decode())

    def describe(self, sandbox: str) -> Sandbox:
        """Ask for a sandbox."""
        answer = self._call("PodSandboxStatus", _write(1, sandbox) + _write(2, 1))
        network = _read(_read(answer[1][0]).get(5, [b""])[0])
        more = [_read(each)[1][0] for each in network.get(2, [])]
        entries = [_read(each) for each in answer[2]]
        (info,) = [json.loads(each[2][0]) for each in entries if each[1] == [b"info"]]
        spaces = info["runtimeSpec"]["linux"]["namespaces"]
        (path,) = [Path(each["path"]) for each in spaces if each["type"] == "network"]
        addresses = tuple(each.decode() for each in [*network.get(1, []), *more])
        return Sandbox(sandbox, info["pid"], path, addresses)

    def stop(self, sandbox: str) -> None:
        """Stop a sandbox: the runtime takes its network away."""
        self._call("StopPodSandbox", _write(1, sandbox))

    def remove(self, sandbox: str) -> None:
        """Stop and remove a sandbox."""
        self.stop(sandbox)
        self._call("RemovePodSandbox", _write(1, sandbox))
        self.running.remove(sandbox)

    def end(self) -> None:
        """End everything, whatever state it is in."""
        try:
            for sandbox in list(self.running):
                self.remove(sandbox)
        finally:
            if self._process is not None:
                self._channel.close()
                self._process.terminate()
                self._process.wait(20)
            for pid in self._shims():
                os.kill(pid, signal.SIGKILL)
            for hierarchy in Path("/sys/fs/cgroup").glob(f"*{self.cgroup}"):
                _clear(hierarchy)
            mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
            for mount in reversed(mounts):
                if mount.startswith(f"{self.directory}/"):
                    subprocess.run(["umount", "-l", mount], check=True)
            netns.run_aside(lambda: netlink.delete_link(BRIDGE))
            log = self.directory / "containerd.log"
            if log.exists():
                print(f"--- containerd\n{log.read_text()[-4000:]}")  # noqa: T201  # on failure

    def _shims(self) -> Iterator[int]:
        """Yield the processes that containerd leaves to look after sandboxes."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"containerd-shim" in words[0] and str(self.socket).encode() in words:
                yield int(path.parent.name)

    def wait_ready(self) -> None:
        """Wait until the runtime has a network."""
        wait_until(self.is_network_ready)


def _clear(cgroup: Path) -> None:
    """Kill what is in a cgroup of either version, and remove it."""
    directories = [Path(directory) for directory, _names, _files in os.walk(cgroup)]
    for directory in reversed(directories):
        for pid in (directory / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda directory=directory: _is_removed(directory))  # type: ignore[misc]  # bound


def _is_removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):  # busy, while what was killed ends
        directory.rmdir()
    return not directory.exists()


def _image(program: bytes) -> bytes:
    """Build an archive of one image with one file, as `docker save` does."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add(tar, "pause", program, 0o755)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        _add(tar, "config.json", json.dumps(config).encode())
        _add(tar, "layer.tar", layer.getvalue())
        _add(tar, "manifest.json", json.dumps(manifest).encode())
    return archive.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    tar.addfile(member, io.BytesIO(content))

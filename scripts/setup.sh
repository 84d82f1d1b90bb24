#!/usr/bin/env bash
# Prepare a Debian 12 machine: system packages, the BPF file system, and the virtual environment
# .venv. Idempotent: a second run changes nothing and takes a moment. Needs root, as BPF does.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
	echo "setup: $*" >&2
	exit 2
}

[ "$(id -u)" -eq 0 ] || refuse "root is missing: loading BPF programs and making namespaces need it"
command -v apt-get >/dev/null || refuse "apt-get is missing: this script prepares Debian 12"

# bcc compiles and loads, libbpf opens pins, linux-libc-dev has the UAPI headers; gcc compares
# layouts in tests; musl-tools builds the CNI plugin; the rest are the programs of the demo and of the
# tests, with a container runtime and the plugins of a network for those of the CNI plugin.
packages=(
	python3-bpfcc python3-venv libbpf1 linux-libc-dev libc6-dev gcc clang-format openssl shellcheck
	musl-tools
	iproute2 iptables nftables conntrack tcpdump nginx-light curl procps
	containerd runc containernetworking-plugins
)
missing=()
for package in "${packages[@]}"; do
	[ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] ||
		missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
	echo "setup: installing ${missing[*]}"
	# A service that a package starts by itself would sit on this machine's ports.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		trap 'rm -f "$policy"' EXIT
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get -qq update
	apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

scripts/build_shim.sh

mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf ||
	refuse "the BPF file system cannot be mounted on /sys/fs/bpf: is CONFIG_BPF_SYSCALL set?"

# Prometheus reads the metrics, and promtool checks the alert rules. Of Debian's package only these
# programs are taken: the rest is a service.
if [ ! -x .venv/bin/promtool ] || [ ! -x .venv/bin/prometheus ]; then
	echo "setup: taking Prometheus"
	fetched=$(mktemp -d)
	chown _apt "$fetched" # apt downloads as this user, or says that it cannot
	(cd "$fetched" && apt-get -qq update && apt-get -qq download prometheus)
	mkdir -p .venv/bin
	dpkg-deb --fsys-tarfile "$fetched"/prometheus_*.deb |
		tar -x -C .venv/bin --strip-components=3 ./usr/bin/promtool ./usr/bin/prometheus
	rm -r "$fetched"
fi

# Debian's own interpreter: the one that Debian's bcc is built for.
stamp=.venv/.complete
if ! cmp -s pyproject.toml "$stamp"; then
	echo "setup: making .venv"
	[ -x .venv/bin/python ] || /usr/bin/python3 -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	PYTHONWARNINGS=ignore .venv/bin/python -m pip install -q -e . --group dev
	# bcc is on no package index. Of Debian's Python packages only this one is let in.
	site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	ln -sfn /usr/lib/python3/dist-packages/bcc "$site/bcc"
	# An agent that compiles what it imports is 3 MiB larger than one that does not.
	.venv/bin/python -m compileall -q agent cni
	cp pyproject.toml "$stamp"
fi

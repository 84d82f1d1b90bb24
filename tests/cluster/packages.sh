#!/usr/bin/env bash
# Debian's container runtime, its CNI plugins, and what builds an image without a registry.
set -euo pipefail

packages=(containerd runc containernetworking-plugins buildah mmdebstrap)
missing=()
for package in "${packages[@]}"; do
	[ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] ||
		missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0
echo "packages.sh: installing ${missing[*]}" >&2
# A containerd that starts by itself would be in the way of the tests' own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null

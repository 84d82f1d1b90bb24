#!/usr/bin/env bash
# Build Kubernetes' API server from the Go module proxy, unless it is there: about seven minutes on
# two cores. Prints where it is. The versions are those of apiserver/go.mod beside this file.
set -euo pipefail
cd "$(dirname "$0")/apiserver"
cache=${SIDESTEP_CACHE:-$HOME/.cache/sidestep}
version=$(awk '$1 == "k8s.io/kubernetes" {print $2}' go.mod)
binary=$cache/bin/kube-apiserver-$version

if [ ! -x "$binary" ]; then
	command -v go >/dev/null || {
		echo "build.sh: Go is missing: tests/cluster runs the real API server, built from source" >&2
		exit 2
	}
	echo "build.sh: building the API server $version, which takes minutes" >&2
	mkdir -p "$cache/bin"
	stamp=k8s.io/component-base/version
	minor=${version#v1.}
	CGO_ENABLED=0 nice go build -p "${BUILD_JOBS:-2}" -trimpath -buildvcs=false -o "$binary.new" -ldflags \
		"-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*}" .
	mv "$binary.new" "$binary"
fi
echo "$binary"

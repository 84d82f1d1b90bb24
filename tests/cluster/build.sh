#!/usr/bin/env bash
# Build Kubernetes' programs and Helm from the Go module proxy, unless they are there: about eight
# minutes on two cores. Prints the directory that they are in. Versions: kubernetes/go.mod.
set -euo pipefail
cd "$(dirname "$0")/kubernetes"
cache=${SIDESTEP_CACHE:-$HOME/.cache/sidestep}
version=$(awk '$1 == "k8s.io/kubernetes" {print $2}' go.mod)
directory=$cache/bin/$version-$(cat go.mod main.go ../build.sh | sha256sum | cut -c -8)
programs=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet)

if [ ! -d "$directory" ]; then
	command -v go >/dev/null || {
		echo "build.sh: Go is missing: tests/cluster runs the real Kubernetes, built from source" >&2
		exit 2
	}
	echo "build.sh: building Kubernetes $version, which takes minutes" >&2
	made=$directory.new
	rm -rf "$made"
	mkdir -p "$made"
	stamp=k8s.io/component-base/version
	minor=${version#v1.}
	build=(env CGO_ENABLED=0 nice go build -p "${BUILD_JOBS:-2}" -trimpath -buildvcs=false)
	"${build[@]}" -o "$made/kubernetes" -ldflags \
		"-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*}" .
	for program in "${programs[@]}"; do
		ln "$made/kubernetes" "$made/$program"
	done
	# What charts are rendered for, where no cluster is asked.
	stamp=helm.sh/helm/v3/pkg/chartutil
	"${build[@]}" -o "$made/helm" -ldflags \
		"-s -w -X $stamp.k8sVersionMajor=1 -X $stamp.k8sVersionMinor=${minor%%.*}" \
		helm.sh/helm/v3/cmd/helm
	mv "$made" "$directory"
fi
echo "$directory"

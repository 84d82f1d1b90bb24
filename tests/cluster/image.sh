#!/usr/bin/env bash
# Build deploy/Dockerfile and the image of a pod's sandbox, unless they are there. Prints the
# directory with both as OCI archives.
#
# No registry is asked: what the Dockerfile calls debian:12-slim is made from Debian's packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
cache=${SIDESTEP_CACHE:-$HOME/.cache/sidestep}/images
sources=$(git ls-files --cached --others --exclude-standard agent bpf cni deploy/Dockerfile .dockerignore \
	pyproject.toml tests/cluster/image.sh tests/cluster/node/pause.c)
directory=$cache/$(for file in $sources; do [ ! -f "$file" ] || sha256sum "$file"; done |
	sha256sum | cut -c -12)

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ ! -d "$directory" ]; then
	"$here/packages.sh"
	made=$cache/new
	rm -rf "$made"
	mkdir -p "$made"
	base=$cache/debian-12-slim.tar
	if [ ! -f "$base" ]; then
		echo "image.sh: making a Debian 12, with the certificates that pip would bring" >&2
		mmdebstrap --quiet --format=tar --variant=minbase --include=ca-certificates --dpkgopt='path-exclude=/usr/share/doc/*' \
			--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
			bookworm "$base.new" http://deb.debian.org/debian
		rm -rf "$cache/containers"
		mv "$base.new" "$base"
	fi
	echo "image.sh: building the image" >&2
	buildah=(buildah --root "$cache/containers" --runroot "$made/run")
	if ! "${buildah[@]}" inspect --type image docker.io/library/debian:12-slim >/dev/null 2>&1; then
		container=$("${buildah[@]}" from scratch)
		"${buildah[@]}" add --quiet "$container" "$base" / >/dev/null
		"${buildah[@]}" commit --quiet --rm "$container" docker.io/library/debian:12-slim >/dev/null
	fi
	# This machine may stand behind a proxy that has certificates of its own.
	"${buildah[@]}" bud --isolation chroot --pull-never --layers -f deploy/Dockerfile \
		--volume /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro \
		--tag localhost/sidestep:test . >"$made/build.log" 2>&1 ||
		{ tail -n 40 "$made/build.log" >&2 && exit 1; }
	"${buildah[@]}" push --quiet localhost/sidestep:test \
		"oci-archive:$made/sidestep.tar:localhost/sidestep:test"
	gcc -static -Os -s -Wall -Werror -o "$made/pause" "$here/node/pause.c"
	container=$("${buildah[@]}" from scratch)
	"${buildah[@]}" add --quiet "$container" "$made/pause" /pause >/dev/null
	"${buildah[@]}" config --entrypoint '["/pause"]' "$container"
	"${buildah[@]}" commit --quiet --rm "$container" localhost/pause:test >/dev/null
	"${buildah[@]}" push --quiet localhost/pause:test \
		"oci-archive:$made/pause.tar:localhost/pause:test"
	# Archives of sources that changed since are of no use to anybody.
	find "$cache" -mindepth 1 -maxdepth 1 -type d -regex '.*/[0-9a-f]*' -exec rm -rf {} +
	rm -rf "$made/run"
	mv "$made" "$directory"
fi
echo "$directory"

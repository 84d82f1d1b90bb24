#!/usr/bin/env bash
# Render the chart for whoever has no Helm: `render_manifests.sh HELM DIRECTORY` writes sidestep.yaml,
# and uninstall.yaml, whose pods take off a node what the agents left.
set -euo pipefail
cd "$(dirname "$0")/.."
render() {
	echo "# Made from deploy/chart by scripts/render_manifests.sh; edit the chart, not this file."
	echo "# The image is a placeholder: put the one that you built in its place."
	"$helm" template sidestep deploy/chart --namespace sidestep-system "$@"
}

helm=$1
render --set createNamespace=true --no-hooks >"$2/sidestep.yaml"
render --show-only templates/uninstall.yaml >"$2/uninstall.yaml"

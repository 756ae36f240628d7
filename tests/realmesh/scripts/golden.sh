#!/usr/bin/env bash
# Writes what istiod sends a node proxy for the objects of mesh/, but for shop.yaml: golden/ for tests/golden.rs.
# usage: golden.sh BIN OUT
set -euo pipefail
here=$(dirname "$(realpath "$0")")
bin=$(realpath "$1"); out=$(realpath "$2")
if [ -z "${IN_BED:-}" ]; then
  run=$(mktemp -d); trap 'ip netns del golden; rm -rf "$run"; rmdir /host 2>/dev/null' EXIT
  IN_BED=$run "$here/isolated.sh" golden "$0" "$bin" "$out"; exit
fi
export HOST=192.0.2.1 CRDS=crd-experimental KUBECONFIG=$IN_BED/kubeconfig
"$here/up.sh" "$bin" "$IN_BED"
for file in kube gateway istio wide more; do "$bin/lab" apply -f "$here/../mesh/$file.yaml"; done
sleep 3 # gives addresses to what has none, and status to gateways
"$bin/lab" xds -addr "$HOST:15010" -raw "$out" >/dev/null

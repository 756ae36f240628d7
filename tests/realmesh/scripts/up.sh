#!/usr/bin/env bash
# Starts etcd, kube-apiserver, kube-controller-manager, the CRDs, the chart's
# configuration and istiod. usage: up.sh BIN RUN
# BIN holds what `build` makes. Every process id lands in RUN/*.pid; they end with the
# process namespace that this is run in.
set -euo pipefail
bin=$(realpath "$1"); mkdir -p "$2"; run=$(realpath "$2"); here=$(dirname "$(realpath "$0")")
host=${HOST:-127.0.0.1} # where nodes and proxies reach apiserver and istiod
t0=$SECONDS; lap() { printf '%3d s %s\n' $((SECONDS - t0)) "$1"; }
start() { "$here/start.sh" "$bin" "$run" "$1"; lap "$1"; }
kubeconfig() { cat >"$1" <<Y
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://$host:6443", certificate-authority: $run/pki/apiserver.crt}}]
users: [{name: user, user: {token: $2}}]
contexts: [{name: lab, context: {cluster: lab, user: user, namespace: default}}]
current-context: lab
Y
}

cd "$run"; mkdir -p pki istiod
openssl genrsa -out pki/sa.key 2048 2>/dev/null; openssl rsa -in pki/sa.key -pubout -out pki/sa.pub 2>/dev/null
admin=$(openssl rand -hex 16); echo "$admin,admin,admin,system:masters" >pki/tokens.csv
start etcd
start apiserver
kubeconfig kubeconfig "$admin"; export KUBECONFIG=$run/kubeconfig
start manager
"$bin/istioctl" manifest generate --set profile=ambient >chart.yaml 2>istioctl.log
printf 'apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n' >ns.yaml
"$bin/lab" apply -f "$bin/${CRDS:-crd}"
"$bin/lab" apply -only Namespace,CustomResourceDefinition,ConfigMap,ServiceAccount,ClusterRole,ClusterRoleBinding,Role,RoleBinding,Service -f ns.yaml -f chart.yaml
lap "CRDs, chart"
# istiod runs as its own account, so the chart's RBAC is what it gets
kubeconfig istiod/kubeconfig "$("$bin/lab" token -n istio-system -sa istiod -aud https://kubernetes.default.svc)"
start istiod
"$bin/kube" kubectl -n istio-system get secret istio-ca-secret -o 'jsonpath={.data.ca-cert\.pem}' | base64 -d >"$run/root.pem"; lap "CA root in root.pem"

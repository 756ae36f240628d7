#!/usr/bin/env bash
# Starts etcd, kube-apiserver, kube-controller-manager, the CRDs, the chart's
# configuration and istiod, all on loopback. usage: up.sh BIN RUN
# BIN holds kube, lab, discovery and istioctl (built from this folder).
# Every process id lands in RUN/*.pid; down.sh ends them. NO_MANAGER=1 leaves
# the controller manager out (then EndpointSlices are yours to write).
set -euo pipefail
bin=$(realpath "$1"); mkdir -p "$2"; run=$(realpath "$2")
host=${HOST:-127.0.0.1} # where nodes and proxies reach apiserver and istiod
start() { local n=$1; shift; setsid "$@" >"$run/$n.log" 2>&1 </dev/null & echo $! >"$run/$n.pid"; }
upto() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; echo "timed out: $*" >&2; return 1; }
t0=$SECONDS; lap() { printf '%3d s %s\n' $((SECONDS - t0)) "$1"; }
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
if [ ! -e pki/sa.key ]; then
  openssl genrsa -out pki/sa.key 2048 2>/dev/null; openssl rsa -in pki/sa.key -pubout -out pki/sa.pub 2>/dev/null
  echo "$(openssl rand -hex 16),admin,admin,system:masters" >pki/tokens.csv
fi
admin=$(cut -d, -f1 pki/tokens.csv)
start etcd etcd --data-dir "$run/etcd" --unsafe-no-fsync \
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380
upto curl -sf http://127.0.0.1:2379/health; lap etcd
start apiserver "$bin/kube" apiserver --etcd-servers http://127.0.0.1:2379 \
  --bind-address "$host" --advertise-address "$host" --secure-port 6443 --cert-dir "$run/pki" \
  --token-auth-file pki/tokens.csv --authorization-mode RBAC --allow-privileged=true \
  --service-account-issuer https://kubernetes.default.svc --service-account-key-file pki/sa.pub --service-account-signing-key-file pki/sa.key \
  --service-cluster-ip-range 10.96.0.0/16
upto curl -skf -H "Authorization: Bearer $admin" "https://$host:6443/readyz"; lap apiserver
kubeconfig kubeconfig "$admin"; export KUBECONFIG=$run/kubeconfig
if [ -z "${NO_MANAGER:-}" ]; then
  start manager "$bin/kube" controller-manager --kubeconfig "$run/kubeconfig" --bind-address 127.0.0.1 --secure-port 10257 \
    --service-account-private-key-file pki/sa.key --root-ca-file pki/apiserver.crt \
    --leader-elect=false --cert-dir "$run/pki-manager" --controllers "${CONTROLLERS:-*,-node-lifecycle-controller}"
fi
"$bin/istioctl" manifest generate --set profile=ambient ${ISTIO_SET:-} >chart.yaml 2>istioctl.log
printf 'apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n' >ns.yaml
"$bin/lab" apply -f "$bin/crd"
"$bin/lab" apply -only Namespace,CustomResourceDefinition,ConfigMap,ServiceAccount,ClusterRole,ClusterRoleBinding,Role,RoleBinding,Service -f ns.yaml -f chart.yaml
lap "CRDs, chart"
# istiod runs as its own account, so the chart's RBAC is what it gets
kubeconfig istiod/kubeconfig "$("$bin/lab" token -n istio-system -sa istiod -aud https://kubernetes.default.svc)"
cd istiod
start istiod env POD_NAME=istiod-lab POD_NAMESPACE=istio-system SERVICE_ACCOUNT=istiod REVISION=default CLUSTER_ID=Kubernetes \
  PILOT_ENABLE_AMBIENT=true CA_TRUSTED_NODE_ACCOUNTS=istio-system/ztunnel PILOT_CERT_PROVIDER=istiod ${ISTIOD_ENV:-} \
  "$bin/discovery" discovery --kubeconfig "$run/istiod/kubeconfig" \
  --httpAddr "$host:8080" --httpsAddr "$host:15017" --grpcAddr "$host:15010" --secureGRPCAddr "$host:15012" \
  --monitoringAddr "$host:15014" --ctrlz_port 0
upto curl -sf "http://$host:8080/ready"; lap istiod
"$bin/kube" kubectl -n istio-system get secret istio-ca-secret -o 'jsonpath={.data.ca-cert\.pem}' | base64 -d >"$run/root.pem"; lap "CA root in root.pem"

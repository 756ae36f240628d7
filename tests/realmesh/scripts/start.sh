#!/usr/bin/env bash
# Starts one of the processes of up.sh, also one that was killed, and waits until it serves.
# usage: start.sh BIN RUN etcd|apiserver|manager|istiod
set -euo pipefail
bin=$(realpath "$1"); run=$(realpath "$2"); what=$3
host=${HOST:-127.0.0.1} # where nodes and proxies reach apiserver and istiod
start() { setsid "$@" >>"$run/$what.log" 2>&1 </dev/null & echo $! >"$run/$what.pid"; }
upto() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; echo "timed out: $*; see $run/$what.log" >&2; return 1; }

cd "$run"
case $what in
etcd)
  start etcd --data-dir "$run/etcd" --unsafe-no-fsync \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380
  upto curl -sf http://127.0.0.1:2379/health ;;
apiserver)
  start "$bin/kube" apiserver --etcd-servers http://127.0.0.1:2379 \
    --bind-address "$host" --advertise-address "$host" --secure-port 6443 --cert-dir "$run/pki" \
    --token-auth-file pki/tokens.csv --authorization-mode RBAC --allow-privileged=true --kubelet-preferred-address-types=InternalIP \
    --service-account-issuer https://kubernetes.default.svc --service-account-key-file pki/sa.pub --service-account-signing-key-file pki/sa.key \
    --service-cluster-ip-range 10.96.0.0/16,fd00:10:96::/112
  upto curl -skf -H "Authorization: Bearer $(cut -d, -f1 pki/tokens.csv)" "https://$host:6443/readyz" ;;
manager)
  start "$bin/kube" controller-manager --kubeconfig "$run/kubeconfig" --bind-address 127.0.0.1 --secure-port 10257 \
    --service-account-private-key-file pki/sa.key --root-ca-file pki/apiserver.crt \
    --leader-elect=false --cert-dir "$run/pki-manager" --controllers "${CONTROLLERS:-*,-node-lifecycle-controller}" ;;
istiod)
  cd istiod
  start env POD_NAME=istiod-lab POD_NAMESPACE=istio-system SERVICE_ACCOUNT=istiod REVISION=default CLUSTER_ID=Kubernetes \
    PILOT_ENABLE_AMBIENT=true CA_TRUSTED_NODE_ACCOUNTS=istio-system/ztunnel PILOT_CERT_PROVIDER=istiod \
    "$bin/discovery" discovery --kubeconfig "$run/istiod/kubeconfig" \
    --httpAddr "$host:8080" --httpsAddr "$host:15017" --grpcAddr "$host:15010" --secureGRPCAddr "$host:15012" \
    --monitoringAddr "$host:15014" --ctrlz_port 0
  upto curl -sf "http://$host:8080/ready" ;;
*)
  echo "no part $what" >&2; exit 2 ;;
esac

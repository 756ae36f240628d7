#!/usr/bin/env bash
# Adds one real node (containerd, kubelet, CNI bridge, kube-scheduler) to what
# up.sh started. usage: node.sh BIN RUN NAME; POD_NET (first three
# octets), NODE_IP and SCHEDULER=no for a second one; NODE_PROXY is an executable
# of which to have an image, lab.test/ztunnel:1. Run it, and up.sh, inside a network
# namespace of its own: the bridge and the routes land there; and each node in a
# mount namespace of its own: all have /run/ztunnel and /opt/cni.
set -euo pipefail
bin=$(realpath "$1"); run=$(realpath "$2"); name=$3; here=$(dirname "$(realpath "$0")")
start() { local n=$1; shift; setsid "$@" >"$d/$n.log" 2>&1 </dev/null & echo $! >"$d/$n.pid"; }
upto() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; echo "timed out: $*" >&2; return 1; }
d=$run/$name; net=${POD_NET:-10.1.0}; ip=${NODE_IP:-192.0.2.1}; mkdir -p "$d"/{cni,cnibin,kubelet,containerd,state,pki}
cp /usr/lib/cni/* "$d/cnibin/"
cat >"$d/containerd.toml" <<T
version = 2
root = "$d/containerd"
state = "$d/state"
[grpc]
  address = "$d/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab.test/app:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$d/cnibin"
    conf_dir = "$d/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
T
cat >"$d/cni/10-lab.conflist" <<J
{"cniVersion": "0.4.0", "name": "lab", "plugins": [
 {"type": "bridge", "bridge": "lab0", "isGateway": true, "ipMasq": false,
  "ipam": {"type": "host-local", "dataDir": "$d/ipam", "ranges": [[{"subnet": "$net.0/24"}], [{"subnet": "fd00:${net//./:}::/64"}]],
  "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
 {"type": "loopback"}]}
J
cat >"$d/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $ip
readOnlyPort: 0
podLogsDir: $d/logs
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: true
cgroupRoot: /lab-$name
enforceNodeAllocatable: []
failSwapOn: false
makeIPTablesUtilChains: false
containerRuntimeEndpoint: unix://$d/containerd.sock
resolvConf: ""
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: 100Mi}
imageMinimumGCAge: 24h
Y
for c in /sys/fs/cgroup/*/; do # one cgroup root a node: two kubelets on one would end each other's pods
  mkdir -p "$c/lab-$name"
  for f in cpuset.cpus cpuset.mems; do [ ! -e "$c/$f" ] || cat "$c/$f" >"$c/lab-$name/$f"; done
done
start containerd containerd --config "$d/containerd.toml"
ctr=(ctr -a "$d/containerd.sock" -n k8s.io)
upto "${ctr[@]}" version
python3 "$here/image.py" "$bin/app" /app lab.test/app:1 "$d/image.tar"; "${ctr[@]}" images import "$d/image.tar"
if [ -n "${NODE_PROXY:-}" ]; then
  python3 "$here/image.py" "$NODE_PROXY" /usr/local/bin/ztunnel lab.test/ztunnel:1 "$d/image.tar"; "${ctr[@]}" images import "$d/image.tar"
fi
rm "$d/image.tar"
[ "${SCHEDULER:-}" = no ] || start scheduler "$bin/kube" scheduler --kubeconfig "$run/kubeconfig" --leader-elect=false --bind-address 127.0.0.1
start kubelet "$bin/kube" kubelet --config "$d/kubelet.yaml" --kubeconfig "$run/kubeconfig" --root-dir "$d/kubelet" --cert-dir "$d/pki" \
  --hostname-override "$name" --node-ip "$ip,fd00::${ip//./:}" --v=2

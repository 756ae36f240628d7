#!/usr/bin/env bash
# Real Istio but for ztunnel on one or two real nodes, then COMMAND inside of
# it, then the end of it all. usage: [NODES=2] [NODE_PROXY=PROGRAM] cluster.sh BIN RUN COMMAND...
set -euo pipefail
here=$(dirname "$(realpath "$0")")
if [ -z "${IN_CLUSTER:-}" ]; then
  ns=lab$$
  end() { # what outlives the process namespace: names, cgroups, and what containers were made of
    ip netns del "$ns"
    find /sys/fs/cgroup -mindepth 2 -depth -type d \( -path '*/lab-node-*' -o -path '*/k8s.io*' \) -exec rmdir {} + 2>/dev/null
    rmdir /host 2>/dev/null
    [ -z "${BED_TEMPORARY:-}" ] || rm -rf "$run_of_it"
  }
  run_of_it=$2; trap end EXIT; trap 'exit 130' INT TERM
  IN_CLUSTER=1 "$here/isolated.sh" "$ns" "$0" "$@"; exit
fi
bin=$(realpath "$1"); mkdir -p "$2"; run=$(realpath "$2"); shift 2
touch /run/netns/node-a; mount --bind /proc/self/ns/net /run/netns/node-a # the first node by name as well
export CONTROLLERS='*' HOST=${NODE_IP:-192.0.2.1}
exec 3>&1 >&2 # what is said on the way is not COMMAND's
"$here/up.sh" "$bin" "$run"; "$here/node.sh" "$bin" "$run" node-a; "$here/cni.sh" "$bin" "$run" node-a
if [ "${NODES:-1}" = 2 ]; then # the second node: its own network namespace, one wire to the first
  ip netns add node-b; ip link add to-b type veth peer name to-a netns node-b
  in_b() { nsenter --net=/run/netns/node-b "$@"; }
  in_b sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.icmp_ratelimit=0
  ip link set to-b up; in_b ip link set lo up; in_b ip link set to-a up
  ip addr add 192.0.2.5/30 dev to-b; ip addr add fd00::192:0:2:5/126 dev to-b nodad
  in_b ip addr add 192.0.2.6/30 dev to-a; in_b ip addr add fd00::192:0:2:6/126 dev to-a nodad
  ip route add 10.1.1.0/24 via 192.0.2.6; ip route add fd00:10:1:1::/64 via fd00::192:0:2:6
  in_b ip route add default via 192.0.2.5; in_b ip route add default via fd00::192:0:2:5
  # and its own folders where a node has one of each; what it mounts is seen in there alone
  POD_NET=10.1.1 NODE_IP=192.0.2.6 SCHEDULER=no in_b unshare --mount --propagation slave bash -c '
    mount --make-rshared /; mount -t tmpfs none /opt; mkdir -p /run/ztunnel; mount -t tmpfs none /run/ztunnel
    "$1/node.sh" "${@:2}"; "$1/cni.sh" "${@:2}"' bash "$here" "$bin" "$run" node-b
fi
export KUBECONFIG=$run/kubeconfig
"$@" >&3 3>&-

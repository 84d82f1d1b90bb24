#!/usr/bin/env bash
# First process of a node of its own: in new network, mount, process and host name namespaces, it
# makes what a machine would have, and then waits. Argument: a directory on a disk, for what the node
# keeps.
#
# What is the machine's own and shared: the kernel, so cgroups and BPF programs.
set -euo pipefail
state=$1

mount --make-rprivate /
# A kubelet wants mounts of volumes to be seen in pods.
mount --make-rshared /
mount -t tmpfs tmpfs /run
# Whole directories, so that nothing that a test leaves there is left on the machine.
for place in /var/lib /var/log /etc/cni /opt; do
	mkdir -p "$place" "$state$place"
	mount --bind "$state$place" "$place"
done
mount -t bpf bpf /sys/fs/bpf
mkdir -p /opt/cni/bin /etc/cni/net.d /run/lock
cp /usr/lib/cni/{bridge,host-local,loopback} /opt/cni/bin/

hostname node-1
ip link set lo up
ip link add eth0 type veth peer name uplink
ip link set uplink up
ip address add 10.246.0.1/24 dev eth0
ip link set eth0 up
ip route add default via 10.246.0.254
echo 1 >/proc/sys/net/ipv4/ip_forward
# As archives of plugins and a CNI that is not root leave them.
chown 1000:1000 /opt/cni/bin /etc/cni/net.d
cat >/etc/cni/net.d/10-bridge.conflist <<'END'
{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.247.0.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    }
  ]
}
END
chown 1000:1000 /etc/cni/net.d/10-bridge.conflist
echo prepared
exec sleep infinity

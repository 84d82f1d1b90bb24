/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every map. Names keep the kernel's limit of 15 characters. All keys carry the netns cookie, which
 * the kernel gives out once and a pod can neither choose nor change, so several agents can share
 * one kernel. "Agent" is the control process unless a worker is named. SS_PINS is the pin
 * directory, given by the compiler.
 */
#ifndef SIDESTEP_MAPS_H
#define SIDESTEP_MAPS_H

#include "types.h"

#define MAX_PODS     1024
#define MAX_LINKS    2048
#define MAX_SERVICES 16384
#define MAX_FLOWS    65536

#define LINK_ANY 0 /* no interface has this number */

/* netns cookie -> the pod's own addresses; presence means enrolled.
 * Written by enroll, read by connect, bind and sockops; lives until unenroll. */
BPF_TABLE_PINNED("hash", u64, struct pod, ss_pods, MAX_PODS, SS_PINS "/ss_pods");

/* netns cookie -> uid, namespace and name, so that the command line can decode the other maps with
 * no agent alive. Written by enroll, read by `sidestep maps`; lives as long as the ss_pods entry.
 */
BPF_TABLE_PINNED("hash", u64, struct pod_name, ss_pod_names, MAX_PODS, SS_PINS "/ss_pod_names");

/* socket of the agent -> 1: never captured. Written from user space with the agent's own socket
 * before bind or connect, which a pod cannot do (an SO_MARK it could). The kernel frees the entry
 * with the socket. */
BPF_TABLE_PINNED("sk_storage", int, u32, ss_exempt, 0, SS_PINS "/ss_exempt", BPF_F_NO_PREALLOC);

/* captured socket -> the destination that it asked for. Written by connect, read by sockops and
 * getpeername; freed with the socket. */
BPF_TABLE_PINNED("sk_storage", int, struct origin, ss_origin, 0, SS_PINS "/ss_origin",
		 BPF_F_NO_PREALLOC);

/* source of a captured connection -> the destination that it asked for. Written by sockops before
 * the SYN leaves, read by the workers at accept and by getpeername; deleted by sockops at the
 * close. A plain hash: an evicted entry would be a connection to nowhere, a full map refuses. */
BPF_TABLE_PINNED("hash", struct source, struct origin, ss_origin_flow, MAX_FLOWS,
		 SS_PINS "/ss_origin_flow");

/* cgroup id of the kubelet -> 1: it may probe the pods of this node. Written by the agent, read by
 * connect. */
BPF_TABLE_PINNED("hash", u64, u32, ss_probers, 16, SS_PINS "/ss_probers");

/* connection into a pod from the agent, or from the kubelet -> which (enum agent_flow): lookup lets
 * it through to the application, and guard passes it where it belongs on the link.
 * Written by sockops before the SYN leaves, deleted by it at the close. */
BPF_TABLE_PINNED("hash", struct inbound_flow, u32, ss_agent_flows, MAX_FLOWS,
		 SS_PINS "/ss_agent_flows");

/* address of an enrolled pod of this node -> the pod, and its link. Written by enroll, read by
 * connect, sockops and guard; lives until unenroll. */
BPF_TABLE_PINNED("hash", struct local, struct resident, ss_local, MAX_PODS * 4,
		 SS_PINS "/ss_local");

/* port of a service, index 0 -> how many endpoints it has. Written by the agent, read by connect.
 */
BPF_TABLE_PINNED("hash", struct service_port, u32, ss_services, MAX_SERVICES,
		 SS_PINS "/ss_services");

/* port of a service, index below the count -> one endpoint. Written by the agent, read by connect.
 */
BPF_TABLE_PINNED("hash", struct service_port, struct endpoint, ss_endpoints, MAX_FLOWS,
		 SS_PINS "/ss_endpoints", BPF_F_NO_PREALLOC);

/* 0 -> the generation of policies and pods; a verdict of another one does not count. Written by the
 * agent at each change, read by connect and by the workers. */
BPF_TABLE_PINNED("array", u32, u64, ss_generation, 1, SS_PINS "/ss_generation");

/* two pods of this node and a port -> the generation in which the connection was allowed. Written
 * by the workers when the destination has answered 200, read by connect. LRU: without the entry
 * a connection goes through the agent, which judges again. */
BPF_TABLE_PINNED("lru_hash", struct verdict_key, u64, ss_verdicts, MAX_FLOWS,
		 SS_PINS "/ss_verdicts");

/* socket of the kubelet that probes a pod -> the pod's netns cookie. Written by connect, read by
 * sockops; freed with the socket. */
BPF_TABLE_PINNED("sk_storage", int, u64, ss_probes, 0, SS_PINS "/ss_probes", BPF_F_NO_PREALLOC);

/* connection on the direct path -> who speaks in it. Written by sockops before the SYN leaves and
 * deleted by it at the close; read by lookup, which lets exactly these in, by guard and by the
 * agent, which closes those that no longer pass. The key is of addresses alone, so that guard finds
 * it in one look from either end: a reader compares the netns cookies of the value, or the links. A
 * plain hash: where it is full, guard drops the SYN, and the next one may find room. */
BPF_TABLE_PINNED("hash", struct connection, struct direct_flow, ss_direct_flows, MAX_FLOWS,
		 SS_PINS "/ss_direct_flows");

/* network that a pod reaches without capture: its own addresses, excluded networks.
 * Written by enroll, read by connect; lives until unenroll. */
BPF_TABLE_PINNED("lpm_trie", struct network, u32, ss_bypass, 16384, SS_PINS "/ss_bypass",
		 BPF_F_NO_PREALLOC);

/* port excluded from capture or from STRICT, by direction. Written by enroll, read by connect,
 * lookup and guard; lives until unenroll. */
BPF_TABLE_PINNED("hash", struct port, u32, ss_ports, 16384, SS_PINS "/ss_ports");

/* netns cookie -> the inbound listener (15006) of the pod. Written by enroll, read by lookup; the
 * kernel removes a listener that is closed, and lookup drops what finds none. Holds listeners
 * only: application sockets in a sockmap lose data (see docs/datapath.md). */
BPF_TABLE_PINNED("sockhash", u64, u64, ss_listeners, MAX_PODS, SS_PINS "/ss_listeners");

/* struct flow_end for each connection that ended on the direct path. Written by sockops, read by
 * the agent; the size is in pages. bcc can not pin a ring buffer by itself: the loader does. */
BPF_RINGBUF_OUTPUT(ss_flow_ends, 256);

/* interface of the node that leads to an enrolled pod -> the pod. Written by enroll, read by guard;
 * lives until unenroll. Node-wide, as the interfaces of a node are. */
BPF_TABLE_PINNED("hash", u32, struct guarded, ss_guards, MAX_LINKS, SS_PINS "/ss_guards");

/* TCP connection that is open, or was -> the interface by which its packets to the pod come, or
 * LINK_ANY. Of the agent, written by guard at the SYN; of the direct path, written by sockops at an
 * end that may have segments behind it. Read by guard, so that the last segments of a connection
 * whose socket is gone still pass. LRU: without the entry guard asks the maps of open connections.
 */
BPF_TABLE_PINNED("lru_hash", struct pod_flow, u32, ss_guard_flows, MAX_FLOWS,
		 SS_PINS "/ss_guard_flows");

/* row * 2 * OUTCOMES + direction * OUTCOMES + outcome -> packets and bytes of one link. An array,
 * since every packet is counted and a hash would cost as much as all else. A row is given to a link
 * by enroll, which writes it to ss_guards and clears it. Written by guard, read by the agent and by
 * `sidestep pods`. */
BPF_TABLE_PINNED("percpu_array", u32, struct counter, ss_counters, MAX_LINKS * 2 * OUTCOMES,
		 SS_PINS "/ss_counters");

/* new connections of a pod by direction and decision -> how many. Written by connect and lookup,
 * read by the agent; lives until unenroll. A full map counts no more, which hurts no connection. */
BPF_TABLE_PINNED("percpu_hash", struct capture_key, u64, ss_captures, MAX_PODS * 8,
		 SS_PINS "/ss_captures");

/* 0 -> where sockops puts a flow_end together, and where its readers find the layout. */
BPF_TABLE_PINNED("percpu_array", u32, struct flow_end, ss_flow_end, 1, SS_PINS "/ss_flow_end");

/* 0 -> how many flow ends found no room in ss_flow_ends. Written by sockops, read by the agent. */
BPF_TABLE_PINNED("array", u32, u64, ss_lost, 1, SS_PINS "/ss_lost");

/* 0 -> what these pins are. Written once by the loader, read by whoever opens the directory. */
BPF_TABLE_PINNED("array", u32, struct meta, ss_meta, 1, SS_PINS "/ss_meta");

/* index -> one instruction of lookup.c, for one stamped copy of it per pod: sk_lookup can not read
 * the netns cookie. Written once by the loader, read by enroll; needs no compiler at run time. */
BPF_TABLE_PINNED("array", u32, u64, ss_lookup_text, 2048, SS_PINS "/ss_lookup_text");

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Keys and values of the maps. Addresses are always 16 bytes, IPv4 in its v4-mapped form
 * (RFC 4291 2.5.5.2), so that one code path serves both families. Python reads these layouts from
 * the BTF of the loaded maps; they are written nowhere else. Padding is explicit and zeroed: a
 * hash compares it.
 */
#ifndef SIDESTEP_TYPES_H
#define SIDESTEP_TYPES_H

struct address {
	union {
		u8 bytes[16];
		__be32 words_be[4];
	};
};

struct pod {
	struct address address4; /* v4-mapped, or all zero: the pod has none */
	struct address address6; /* or all zero */
	u32 is_strict;		 /* plaintext that did not pass the agent is dropped */
	u32 pad;
};

/* A pod as guard knows it: all that nearly every packet needs, in one look. */
struct guarded {
	u64 netns_cookie;
	struct address address4; /* its first addresses, as in struct pod */
	struct address address6;
	u32 row; /* of ss_counters */
	u32 pad;
};

struct pod_name {
	char uid[64];
	char namespace[64]; /* RFC 1123 label: at most 63 */
	char name[256];	    /* RFC 1123 subdomain: at most 253 */
};

struct origin {
	struct address address;
	struct address endpoint; /* chosen for it where that is a service, else zero */
	__be16 port_be;
	__be16 endpoint_port_be;
};

/* A port of a service, and which of its endpoints. */
struct service_port {
	struct address address;
	__be16 port_be;
	u16 index;
};

struct endpoint {
	struct address address;
	__be16 port_be;
	u16 pad;
};

/* One connection as the connecting end sees it: where it comes from. */
struct source {
	u64 netns_cookie;
	struct address address;
	__be16 port_be;
	u16 pad[3];
};

/* One connection into a pod, as the pod's end sees it. */
struct inbound_flow {
	u64 netns_cookie;
	struct address source;
	__be16 source_port_be;
	__be16 destination_port_be;
	u32 pad;
};

/*
 * One TCP connection, the same from whichever end it is looked at: first the end with the lower
 * port, or with the lower address where the ports are equal.
 */
struct connection {
	struct address first;
	struct address second;
	__be16 first_port_be;
	__be16 second_port_be;
};

/* Key of ss_local. */
struct local {
	struct address address;
};

/* Who has an address of this node. */
struct resident {
	u64 netns_cookie;
	u32 link; /* interface of the node that leads there, or 0: none is guarded, or several */
	u32 row;  /* of ss_counters, for that link */
	u32 has_exclusions; /* of ports or networks that it reaches without us */
	u32 pad;
};

/*
 * What a verdict is about: both pods by their netns cookies, and the destination's port. And the
 * family: policies may speak of addresses, and each pod has one of each family.
 */
struct verdict_key {
	u64 source_netns_cookie;
	u64 destination_netns_cookie;
	__be16 port_be;
	u16 is_v6;
	u32 pad;
};

/* A connection on the direct path: `source` is the client. */
struct direct_flow {
	u64 source_netns_cookie;
	u64 destination_netns_cookie;
	u64 socket_cookie;	   /* of the client */
	u64 began_ns;		   /* CLOCK_MONOTONIC */
	u64 received_at_fin_wait2; /* bytes, until the client's FIN was acknowledged */
	struct address source;
	struct address destination;
	__be16 source_port_be;
	__be16 destination_port_be;
	u32 source_link; /* interface of the node by which that end sends, or 0: not known yet */
	u32 destination_link;
	u32 source_row; /* of ss_counters, known as soon as the link is */
	u32 destination_row;
	u32 pad;
};

/* Value of ss_agent_flows. */
enum agent_flow {
	AGENT_FLOW_DIALED = 1, /* by the agent, inside the pod */
	AGENT_FLOW_PROBE = 2,  /* by the kubelet, from the node */
};

/* A connection on the direct path has ended. */
struct flow_end {
	struct direct_flow flow;
	u64 ended_ns;
	u64 bytes_sent; /* by the client */
	u64 bytes_received;
	u32 was_reset; /* or timed out */
	u32 pad;
};

enum direction {
	DIRECTION_OUTBOUND = 0,
	DIRECTION_INBOUND = 1,
	DIRECTION_PLAINTEXT = 2, /* inbound and captured, but not held to be STRICT */
};

/* One TCP connection of a pod, whoever opened it. */
struct pod_flow {
	u64 netns_cookie;
	struct address local;
	struct address remote;
	__be16 local_port_be;
	__be16 remote_port_be;
	u32 pad;
};

/* What became of a packet at the guard. */
enum outcome {
	OUTCOME_PASSED = 0,
	OUTCOME_PLAINTEXT = 1, /* dropped: TCP that did not pass the agent */
	OUTCOME_SPOOFED = 2,   /* dropped: from an address that is not its sender's */
	OUTCOME_FRAGMENT = 3,  /* dropped: fragments or headers that hide the TCP they carry */
};
#define OUTCOMES 4

/* Key of ss_captures. */
struct capture_key {
	u64 netns_cookie;
	u16 direction; /* enum direction */
	u16 decision;  /* enum capture */
	u32 pad;
};

/* What becomes of a new TCP connection from a pod, or to it. */
enum capture {
	CAPTURE_PASS = 0,   /* not ours: leave the connection alone */
	CAPTURE_DIRECT = 1, /* let the kernel connect it to the endpoint */
	CAPTURE_STEER = 2,  /* steer it to the listener */
	CAPTURE_REFUSE = 3, /* it should be steered and cannot be */
};

struct counter {
	u64 packets;
	u64 bytes;
};

struct port {
	u64 netns_cookie;
	__be16 port_be;
	u16 direction;
	u32 pad;
};

struct network {
	u32 prefix_bits; /* counts what follows: 32 of pad, 64 of cookie, then the address */
	u32 pad;
	u64 netns_cookie;
	struct address address;
};

struct meta {
	u64 magic;
	char schema[64];
	char programs[64];
	u32 lookup_instructions; /* length of ss_lookup_text */
	u32 pad;
};

#endif

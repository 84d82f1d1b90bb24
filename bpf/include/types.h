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
};

struct pod_name {
	char uid[64];
	char namespace[64]; /* RFC 1123 label: at most 63 */
	char name[256];	    /* RFC 1123 subdomain: at most 253 */
};

struct origin {
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

/* One connection that the agent dials into a pod with the client's address as source. */
struct agent_flow {
	u64 netns_cookie;
	struct address source;
	__be16 source_port_be;
	__be16 destination_port_be;
	u32 pad;
};

enum direction {
	DIRECTION_OUTBOUND = 0,
	DIRECTION_INBOUND = 1,
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

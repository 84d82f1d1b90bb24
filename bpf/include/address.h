/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Addresses: 16 bytes, IPv4 as v4-mapped. Compiles on the host as well. */
#ifndef SIDESTEP_ADDRESS_H
#define SIDESTEP_ADDRESS_H

#include "types.h"

/* From the C library's headers, which do not go with the kernel's. */
#ifndef AF_INET
#define AF_INET	 2
#define AF_INET6 10
#endif

/*
 * Read one word of the context here and not later: LLVM else merges the loads of two branches into
 * one through a computed pointer, and the verifier allows only constant offsets into a context
 * ("dereference of modified ctx ptr", met on 6.18 with bcc 0.26).
 */
#define CONTEXT_WORD(word)                                                                         \
	({                                                                                         \
		u32 value = (word);                                                                \
		asm volatile("" : "+r"(value));                                                    \
		value;                                                                             \
	})

#define V4_MAPPED_BE bpf_htonl(0x0000ffff)

static __always_inline struct address address_from_v4(__be32 address_be)
{
	struct address address = {};

	address.words_be[2] = V4_MAPPED_BE;
	address.words_be[3] = address_be;
	return address;
}

static __always_inline bool address_is_v4(const struct address *address)
{
	return !address->words_be[0] && !address->words_be[1] &&
	       address->words_be[2] == V4_MAPPED_BE;
}

static __always_inline bool address_is_equal(const struct address *a, const struct address *b)
{
	return a->words_be[0] == b->words_be[0] && a->words_be[1] == b->words_be[1] &&
	       a->words_be[2] == b->words_be[2] && a->words_be[3] == b->words_be[3];
}

/* 127.0.0.0/8 or ::1 */
static __always_inline bool address_is_loopback(const struct address *address)
{
	if (address_is_v4(address))
		return (address->words_be[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !address->words_be[0] && !address->words_be[1] && !address->words_be[2] &&
	       address->words_be[3] == bpf_htonl(1);
}

/*
 * An address that means "this host" or "this link" and so never leaves the pod's own network:
 * loopback, unspecified (connect() to it reaches the own host), fe80::/10 (meaningless without the
 * scope, which the agent would lose).
 */
static __always_inline bool address_is_local_scope(const struct address *address)
{
	if (address_is_loopback(address))
		return true;
	if (address_is_v4(address))
		return !address->words_be[3];
	if (!address->words_be[0] && !address->words_be[1] && !address->words_be[2] &&
	    !address->words_be[3])
		return true;
	return (address->words_be[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

static __always_inline bool address_is_lower(const struct address *a, const struct address *b)
{
	for (int i = 0; i < 4; i++) {
		if (a->words_be[i] != b->words_be[i])
			return bpf_ntohl(a->words_be[i]) < bpf_ntohl(b->words_be[i]);
	}
	return false;
}

/* The key of a connection between two ends, in whichever order they are given. */
static __always_inline struct connection connection_between(const struct address *one,
							    __be16 one_port_be,
							    const struct address *other,
							    __be16 other_port_be)
{
	struct connection connection;
	bool is_in_order = one_port_be == other_port_be
				   ? address_is_lower(one, other)
				   : bpf_ntohs(one_port_be) < bpf_ntohs(other_port_be);

	connection.first = is_in_order ? *one : *other;
	connection.second = is_in_order ? *other : *one;
	connection.first_port_be = is_in_order ? one_port_be : other_port_be;
	connection.second_port_be = is_in_order ? other_port_be : one_port_be;
	return connection;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the logic headers need to compile on the host, where their unit tests run: the short type
 * names, byte order, and maps whose methods are pointers that a test sets. Include it first.
 */
#ifndef SIDESTEP_HOST_H
#define SIDESTEP_HOST_H

#include <endian.h>
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;

#define bpf_htons htobe16
#define bpf_htonl htobe32
#define bpf_ntohs be16toh
#define bpf_ntohl be32toh
#define SS_PINS	  ""

/* bcc's maps; a method that a test leaves at zero must not be called by what it tests. */
#define BPF_TABLE_PINNED(kind, key_type, leaf_type, name, ...)                                     \
	static struct {                                                                            \
		leaf_type *(*lookup)(key_type * key);                                              \
		leaf_type *(*sk_storage_get)(void *socket, void *initial, int flags);              \
		int (*sk_storage_delete)(void *socket);                                            \
	} name __attribute__((unused))
#define BPF_RINGBUF_OUTPUT(name, pages) static int name __attribute__((unused))

/* The cookie of the namespace in which a test's program runs. */
static u64 netns_cookie_of_test __attribute__((unused));
#define bpf_get_netns_cookie(context) netns_cookie_of_test

/* Its cgroup, and the next number that it draws. */
static u64 cgroup_id_of_test __attribute__((unused));
static u32 random_of_test __attribute__((unused));
#define bpf_get_current_cgroup_id() cgroup_id_of_test
#define bpf_get_prandom_u32()	    random_of_test

static int checks, failures;

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		checks++;                                                                          \
		if (!(condition)) {                                                                \
			failures++;                                                                \
			printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);                     \
		}                                                                                  \
	} while (0)

/* The end of main(): the number of checks for the runner, and whether all held. */
static inline int conclude(void)
{
	printf("%d checks\n", checks);
	return failures || !checks;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How often each decision was taken about the connections of a pod, and about its packets. */
#ifndef SIDESTEP_COUNT_H
#define SIDESTEP_COUNT_H

#include "maps.h"

static __always_inline void count_capture(u64 netns_cookie, u16 direction, enum capture decision)
{
	struct capture_key key = {};
	u64 *count, first = 1;

	key.netns_cookie = netns_cookie;
	key.direction = direction;
	key.decision = decision;
	count = ss_captures.lookup(&key);
	if (count)
		(*count)++;
	else
		ss_captures.update(&key, &first);
}

static __always_inline void count_packet(struct __sk_buff *skb, u32 row, u16 direction,
					 enum outcome outcome)
{
	u32 index = (row * 2 + direction) * OUTCOMES + outcome;
	struct counter *counter = ss_counters.lookup(&index);

	if (!counter)
		return;
	counter->packets++;
	counter->bytes += skb->len;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * tc on the node's side of a pod's link, both directions: the last line. It counts, and it drops
 * what slipped past the hooks above it: TCP from raw sockets, from sockets made before enrollment,
 * or with the agent dead. ss_guard_out sees what leaves the pod, ss_guard_in what goes to it.
 *
 * Passes by TC_ACT_UNSPEC, so that the filters of others on the same hook have their say too.
 */
#include "count.h"
#include "guard.h"
#include "settled.h"

static __always_inline int guard(struct __sk_buff *skb, u16 direction)
{
	struct segment segment = {};
	struct pod_flow flow = {};
	enum outcome outcome;
	u32 ifindex = skb->ifindex;
	struct guarded *guarded;

	if (pass_settled(skb, direction))
		return TC_ACT_UNSPEC;
	guarded = ss_guards.lookup(&ifindex);
	if (!guarded)
		return TC_ACT_UNSPEC; /* open: the pod is not enrolled */
	flow.netns_cookie = guarded->netns_cookie;
	outcome = guard_outcome(skb, direction, guarded, &flow, &segment);
	count_packet(skb, guarded->row, direction, outcome);
	return outcome == OUTCOME_PASSED ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

int ss_guard_out(struct __sk_buff *skb)
{
	return guard(skb, DIRECTION_OUTBOUND);
}

int ss_guard_in(struct __sk_buff *skb)
{
	return guard(skb, DIRECTION_INBOUND);
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The short way of guard: packets of a direct connection whose links are known, which are nearly
 * all on a busy node. One look into a map says enough then. The links are those that lead to the
 * pods with the netns cookies of both ends: sockops took them from ss_local, or guard saw a packet
 * leave by one, from the pod's own address.
 */
#ifndef SIDESTEP_SETTLED_H
#define SIDESTEP_SETTLED_H

#include "count.h"
#include "segment.h"

/* Who sends a segment to whom. */
struct ends {
	struct address source;
	struct address destination;
	__be16 source_port_be;
	__be16 destination_port_be;
};

/*
 * Read without a helper what nearly every segment is: not fragmented, IP without options, headers
 * in the linear part. False for everything else, which guard looks at in full.
 */
static __always_inline bool plain_ends(struct __sk_buff *skb, struct ends *ends)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ipv4_head *ip = data + ETHERNET_BYTES;
	struct ipv6_head *ip6 = data + ETHERNET_BYTES;
	struct tcp_head *tcp;

	if (skb->protocol == ETHERTYPE_IPV4_BE) {
		tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end || ip->version_length != IPV4_WITHOUT_OPTIONS ||
		    ip->protocol != IPPROTO_TCP || ip->fragment_be & IPV4_FRAGMENT_BE)
			return false;
		ends->source = address_from_v4(ip->source_be);
		ends->destination = address_from_v4(ip->destination_be);
	} else if (skb->protocol == ETHERTYPE_IPV6_BE) {
		tcp = (void *)(ip6 + 1);
		if ((void *)(tcp + 1) > end || ip6->next != IPPROTO_TCP)
			return false;
		ends->source = ip6->source;
		ends->destination = ip6->destination;
	} else {
		return false;
	}
	ends->source_port_be = tcp->source_be;
	ends->destination_port_be = tcp->destination_be;
	return true;
}

/* Count and pass a packet of such a connection; false if it is none. */
static __always_inline bool pass_settled(struct __sk_buff *skb, u16 direction)
{
	struct connection connection;
	struct direct_flow *direct;
	struct ends ends;
	u32 from_link, to_link, from_row, to_row;

	if (!plain_ends(skb, &ends))
		return false;
	connection = connection_between(&ends.source, ends.source_port_be, &ends.destination,
					ends.destination_port_be);
	direct = ss_direct_flows.lookup(&connection);
	if (!direct)
		return false;
	if (ends.source_port_be == direct->source_port_be &&
	    address_is_equal(&ends.source, &direct->source)) {
		from_link = direct->source_link;
		from_row = direct->source_row;
		to_link = direct->destination_link;
		to_row = direct->destination_row;
	} else {
		from_link = direct->destination_link;
		from_row = direct->destination_row;
		to_link = direct->source_link;
		to_row = direct->source_row;
	}
	if (direction == DIRECTION_OUTBOUND && skb->ifindex == from_link) {
		count_packet(skb, from_row, direction, OUTCOME_PASSED);
		return true;
	}
	/* From another link it may be an answer that somebody else on the bridge made up. */
	if (direction == DIRECTION_INBOUND && from_link && skb->ifindex == to_link &&
	    skb->ingress_ifindex == from_link) {
		count_packet(skb, to_row, direction, OUTCOME_PASSED);
		return true;
	}
	return false;
}

#endif

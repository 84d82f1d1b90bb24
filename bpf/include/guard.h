/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which packet of an enrolled pod may pass its link. Only TCP is judged: everything else is counted
 * and passes, unless it comes from outside in the pod's own name. A segment without payload carries
 * nothing, so it passes as well, but for the SYN of a connection that nobody knows. It slipped past
 * connect(), which captures what every enrolled pod opens, STRICT or not: by a raw socket, or while
 * the hooks were detached.
 */
#ifndef SIDESTEP_GUARD_H
#define SIDESTEP_GUARD_H

#include "capture.h"
#include "segment.h"

#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT   2

/*
 * Judge a packet of the direct path; false if it is none. Where links share a bridge, others on it
 * can answer for a pod's address (ARP, neighbor discovery). So what a pod gets has to come by the
 * link that leads to the other end. A pod with several sends by any of them: guard remembers.
 */
static __always_inline bool judge_direct(struct __sk_buff *skb, const struct guarded *guarded,
					 const struct pod_flow *flow, bool is_outbound,
					 enum outcome *outcome)
{
	struct connection connection = connection_between(&flow->local, flow->local_port_be,
							  &flow->remote, flow->remote_port_be);
	struct direct_flow *direct = ss_direct_flows.lookup(&connection);
	bool is_client, is_server;
	u64 other_cookie;
	u32 link;

	if (!direct)
		return false;
	is_client = direct->source_netns_cookie == flow->netns_cookie;
	is_server = direct->destination_netns_cookie == flow->netns_cookie;
	if (!is_client && !is_server)
		return false;
	*outcome = OUTCOME_PASSED;
	if (is_outbound && is_client) {
		direct->source_row = guarded->row;
		direct->source_link = skb->ifindex;
	} else if (is_outbound) {
		direct->destination_row = guarded->row;
		direct->destination_link = skb->ifindex;
	} else {
		link = is_client ? direct->destination_link : direct->source_link;
		other_cookie =
			is_client ? direct->destination_netns_cookie : direct->source_netns_cookie;
		/* Who has several and left the mesh before it said a word is seen by no guard. */
		if (link ? skb->ingress_ifindex != link : !!ss_pods.lookup(&other_cookie))
			*outcome = OUTCOME_SPOOFED;
	}
	return true;
}

/* Of the agent, which speaks for the pod from within it, or of the kubelet. */
static __always_inline bool is_agent_flow(const struct pod_flow *flow)
{
	struct inbound_flow known = {};
	u32 *kind;

	known.netns_cookie = flow->netns_cookie;
	known.source = flow->local;
	known.source_port_be = flow->local_port_be;
	known.destination_port_be = flow->remote_port_be;
	if (ss_agent_flows.lookup(&known))
		return true; /* dialed by the agent in the pod */
	known.source = flow->remote;
	known.source_port_be = flow->remote_port_be;
	known.destination_port_be = flow->local_port_be;
	kind = ss_agent_flows.lookup(&known);
	return kind && *kind == AGENT_FLOW_PROBE;
}

/* Judge a packet of a connection that is open, or was a moment ago; false if it is of none. */
static __always_inline bool judge_known(struct __sk_buff *skb, const struct guarded *guarded,
					const struct pod_flow *flow, bool is_outbound, bool is_syn,
					enum outcome *outcome)
{
	u32 link = LINK_ANY, *known;

	*outcome = OUTCOME_PASSED;
	if (flow->local_port_be == bpf_htons(PORT_INBOUND_HBONE))
		return true; /* a pod cannot bind it: bind.c */
	if (judge_direct(skb, guarded, flow, is_outbound, outcome))
		return true;
	known = is_syn ? 0 : ss_guard_flows.lookup(flow);
	if (known) {
		if (!is_outbound && *known != LINK_ANY && *known != skb->ingress_ifindex)
			*outcome = OUTCOME_SPOOFED;
		return true;
	}
	if (!is_agent_flow(flow))
		return false;
	if (is_syn)
		ss_guard_flows.update(flow, &link);
	return true;
}

/*
 * The application's end of a connection that the agent carries. It stays on the pod's loopback: on
 * the link it would be what the tunnel protects, in plain text, or somebody's words slipped into
 * it.
 */
static __always_inline bool is_carried_flow(const struct pod_flow *flow)
{
	struct inbound_flow known = {};

	known.netns_cookie = flow->netns_cookie;
	known.source = flow->remote;
	known.source_port_be = flow->remote_port_be;
	known.destination_port_be = flow->local_port_be;
	return ss_agent_flows.lookup(&known);
}

static __always_inline bool is_excluded_flow(const struct pod_flow *flow)
{
	return is_excluded_port(flow->netns_cookie, flow->local_port_be, DIRECTION_INBOUND) ||
	       is_excluded_port(flow->netns_cookie, flow->local_port_be, DIRECTION_PLAINTEXT) ||
	       is_bypassed(flow->netns_cookie, &flow->remote, flow->remote_port_be);
}

static __always_inline bool is_own_address(u64 netns_cookie, const struct address *address)
{
	struct local local = {.address = *address};
	struct resident *resident = ss_local.lookup(&local);

	return resident && resident->netns_cookie == netns_cookie;
}

/* The addresses of a packet from the pod to itself, also by one of which nobody has told us. */
static __always_inline bool is_to_itself(const struct segment *segment)
{
	return segment->source.words_be[3] &&
	       address_is_equal(&segment->source, &segment->destination);
}

static __always_inline enum outcome guard_outcome(struct __sk_buff *skb, u16 direction,
						  const struct guarded *guarded,
						  struct pod_flow *flow, struct segment *segment)
{
	struct tcp_head tcp;
	struct pod *pod;
	bool is_outbound = direction == DIRECTION_OUTBOUND, is_syn, opens, has_payload;
	enum outcome outcome;
	__be16 type_be;

	/* Of the frame, as the pod reads it: who sends it from the node may say anything in skb. */
	if (bpf_skb_load_bytes(skb, ETHERTYPE_OFFSET, &type_be, sizeof(type_be)))
		return OUTCOME_PASSED;
	if (type_be == ETHERTYPE_IPV4_BE)
		parse_ipv4(skb, segment);
	else if (type_be == ETHERTYPE_IPV6_BE)
		parse_ipv6(skb, segment);
	else if (type_be == ETHERTYPE_VLAN_BE || type_be == ETHERTYPE_QINQ_BE)
		return OUTCOME_FRAGMENT; /* one tag is off by now, and the kernel follows more */
	/*
	 * Nobody outside speaks as the pod itself. Lookup takes a connection from the pod to itself
	 * for granted, and the kernel does not look any more (accept_local, see enroll.py).
	 */
	if (!is_outbound &&
	    (is_own_address(flow->netns_cookie, &segment->source) || is_to_itself(segment)))
		return OUTCOME_SPOOFED;
	if (!segment->tcp_offset)
		return OUTCOME_PASSED;
	if (is_outbound && !address_is_equal(&guarded->address4, &segment->source) &&
	    !address_is_equal(&guarded->address6, &segment->source) &&
	    !is_own_address(flow->netns_cookie, &segment->source))
		return OUTCOME_SPOOFED;
	if (segment->is_fragment) {
		pod = ss_pods.lookup(&flow->netns_cookie);
		return pod && pod->is_strict ? OUTCOME_FRAGMENT : OUTCOME_PASSED;
	}
	if (bpf_skb_load_bytes(skb, segment->tcp_offset, &tcp, sizeof(tcp)))
		return OUTCOME_FRAGMENT; /* cut short: no TCP of this world sends it */
	flow->local = is_outbound ? segment->source : segment->destination;
	flow->remote = is_outbound ? segment->destination : segment->source;
	flow->local_port_be = is_outbound ? tcp.source_be : tcp.destination_be;
	flow->remote_port_be = is_outbound ? tcp.destination_be : tcp.source_be;

	is_syn = (tcp.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN;
	if (judge_known(skb, guarded, flow, is_outbound, is_syn, &outcome))
		return outcome;
	pod = ss_pods.lookup(&flow->netns_cookie);
	if (!pod)
		return OUTCOME_PASSED; /* open: guarded, not captured: it is leaving the mesh */
	if (is_carried_flow(flow))
		return OUTCOME_PLAINTEXT;
	opens = is_syn && is_outbound;
	if ((!pod->is_strict && !opens) || is_excluded_flow(flow))
		return OUTCOME_PASSED;
	has_payload = segment->tcp_offset + (tcp.offset >> 4) * 4 < segment->end;
	return has_payload || opens ? OUTCOME_PLAINTEXT : OUTCOME_PASSED;
}

#endif

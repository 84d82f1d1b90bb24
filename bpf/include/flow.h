/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What sockops knows of a connection, and what it leaves in the maps for others. */
#ifndef SIDESTEP_FLOW_H
#define SIDESTEP_FLOW_H

#include "address.h"
#include "capture.h"
#include "direct.h"
#include "maps.h"

static __always_inline struct address sockops_local(struct bpf_sock_ops *ops)
{
	struct address address;

	if (ops->family == AF_INET)
		return address_from_v4(CONTEXT_WORD(ops->local_ip4));
	address.words_be[0] = CONTEXT_WORD(ops->local_ip6[0]);
	address.words_be[1] = CONTEXT_WORD(ops->local_ip6[1]);
	address.words_be[2] = CONTEXT_WORD(ops->local_ip6[2]);
	address.words_be[3] = CONTEXT_WORD(ops->local_ip6[3]);
	return address;
}

static __always_inline struct address sockops_remote(struct bpf_sock_ops *ops)
{
	struct address address;

	if (ops->family == AF_INET)
		return address_from_v4(CONTEXT_WORD(ops->remote_ip4));
	address.words_be[0] = CONTEXT_WORD(ops->remote_ip6[0]);
	address.words_be[1] = CONTEXT_WORD(ops->remote_ip6[1]);
	address.words_be[2] = CONTEXT_WORD(ops->remote_ip6[2]);
	address.words_be[3] = CONTEXT_WORD(ops->remote_ip6[3]);
	return address;
}

static __always_inline __be16 sockops_remote_port_be(struct bpf_sock_ops *ops)
{
	u32 port_be = ops->remote_port;

	/* in network order, in the upper half: shift in host order */
	return bpf_htons((u16)bpf_ntohl(port_be));
}

static __always_inline struct source sockops_source(struct bpf_sock_ops *ops)
{
	struct source source = {};

	source.netns_cookie = bpf_get_netns_cookie(ops);
	source.address = sockops_local(ops);
	source.port_be = bpf_htons(ops->local_port);
	return source;
}

/* The connection as the pod behind `netns_cookie` sees it. */
static __always_inline struct inbound_flow sockops_flow(struct bpf_sock_ops *ops, u64 netns_cookie)
{
	struct inbound_flow flow = {};

	flow.netns_cookie = netns_cookie;
	flow.source = sockops_local(ops);
	flow.source_port_be = bpf_htons(ops->local_port);
	flow.destination_port_be = sockops_remote_port_be(ops);
	return flow;
}

static __always_inline struct connection sockops_connection(struct bpf_sock_ops *ops)
{
	struct address local = sockops_local(ops), remote = sockops_remote(ops);

	return connection_between(&local, bpf_htons(ops->local_port), &remote,
				  sockops_remote_port_be(ops));
}

/*
 * Publish a connection that goes to a pod of this node and has a verdict. Connect asked for one as
 * well, but from there to the SYN may be any time (TCP_FASTOPEN_CONNECT waits for the first data).
 * And the generation is looked at again after the flow can be seen. Either the agent, which starts
 * a generation and then lists the flows, finds this one, or this finds the generation. Closed:
 * false if the flow is not published. Guard then drops the SYN, or else lookup captures it.
 */
static __always_inline bool publish_direct(struct bpf_sock_ops *ops)
{
	struct local local = {.address = sockops_local(ops)};
	struct local remote = {.address = sockops_remote(ops)};
	struct resident *source = ss_local.lookup(&local), *destination = ss_local.lookup(&remote);
	u64 netns_cookie = bpf_get_netns_cookie(ops), allowed, *generation;
	struct connection connection;
	struct direct_flow flow = {};
	u32 zero = 0;

	if (!destination || !source || source->netns_cookie != netns_cookie)
		return false; /* from the address of another, whose connections this could end */
	flow.source_port_be = bpf_htons(ops->local_port);
	flow.destination_port_be = sockops_remote_port_be(ops);
	if (source->has_exclusions &&
	    is_bypassed(netns_cookie, &remote.address, flow.destination_port_be))
		return false; /* the verdict is about another way to there, as by a service */
	if (!has_verdict(netns_cookie, destination->netns_cookie, &remote.address,
			 flow.destination_port_be, &allowed))
		return false;
	flow.source_netns_cookie = netns_cookie;
	flow.source_link = source->link;
	flow.source_row = source->row;
	flow.destination_netns_cookie = destination->netns_cookie;
	flow.destination_link = destination->link;
	flow.destination_row = destination->row;
	flow.socket_cookie = bpf_get_socket_cookie(ops);
	flow.began_ns = bpf_ktime_get_ns();
	flow.source = local.address;
	flow.destination = remote.address;
	connection = connection_between(&flow.source, flow.source_port_be, &flow.destination,
					flow.destination_port_be);
	if (ss_direct_flows.update(&connection, &flow))
		return false;
	generation = ss_generation.lookup(&zero);
	if (generation && *generation == allowed)
		return true;
	ss_direct_flows.delete(&connection);
	return false;
}

/*
 * Whether a connection that was not published may be so before its SYN goes out again: most changes
 * of policy allow it as before, and by then somebody's first one has a verdict for it.
 */
static __always_inline bool may_be_late(struct bpf_sock_ops *ops)
{
	struct local remote = {.address = sockops_remote(ops)};
	u64 netns_cookie = bpf_get_netns_cookie(ops);

	return ss_pods.lookup(&netns_cookie) && ss_local.lookup(&remote);
}

/* The flow of a socket, if it is the client's end of one. */
static __always_inline struct direct_flow *own_flow(struct bpf_sock_ops *ops,
						    struct connection *connection)
{
	struct direct_flow *flow = ss_direct_flows.lookup(connection);

	return flow && flow->socket_cookie == bpf_get_socket_cookie(ops) ? flow : 0;
}

static __always_inline void note_fin_wait2(struct bpf_sock_ops *ops)
{
	struct connection connection = sockops_connection(ops);
	struct direct_flow *flow = own_flow(ops, &connection);

	if (flow)
		flow->received_at_fin_wait2 = ops->bytes_received;
}

/*
 * The kernel counts sequence numbers: in bytes_acked our SYN and FIN are one byte each, in
 * bytes_received the peer's FIN. Whether a FIN was counted follows from the last state. From
 * FIN_WAIT2 the peer's FIN leads to the end, but so does close() when nobody waits for that FIN:
 * then nothing was received meanwhile. (Data without a FIN, and then close() or a reset, is one
 * byte short.)
 */
static __always_inline void count_bytes(struct bpf_sock_ops *ops, struct flow_end *end)
{
	u32 state = ops->args[0];
	bool is_both = state == BPF_TCP_LAST_ACK || state == BPF_TCP_CLOSING;
	bool has_fin = is_both || state == BPF_TCP_CLOSE_WAIT ||
		       (state == BPF_TCP_FIN_WAIT2 &&
			ops->bytes_received != end->flow.received_at_fin_wait2);

	end->bytes_sent = ops->bytes_acked - 1 - (is_both || state == BPF_TCP_FIN_WAIT2);
	end->bytes_received = ops->bytes_received - has_fin;
	end->was_reset = !is_both && state != BPF_TCP_FIN_WAIT2;
}

static __always_inline void remember_end(u64 netns_cookie, const struct address *local,
					 __be16 local_port_be, const struct address *remote,
					 __be16 remote_port_be, u32 link)
{
	struct pod_flow guarded = {};

	guarded.netns_cookie = netns_cookie;
	guarded.local = *local;
	guarded.remote = *remote;
	guarded.local_port_be = local_port_be;
	guarded.remote_port_be = remote_port_be;
	ss_guard_flows.update(&guarded, &link);
}

/*
 * Guard lets pass what it remembers, once the flow is gone. From LAST_ACK nothing with payload
 * comes any more, since both FINs are acknowledged, and most connections end there on one of both
 * sides: so these cost nothing here.
 */
static __always_inline void remember_guarded(const struct direct_flow *flow)
{
	if (!flow->source_link || !flow->destination_link)
		return; /* an end that no guard has seen: it has sent nothing that could be late */
	remember_end(flow->source_netns_cookie, &flow->source, flow->source_port_be,
		     &flow->destination, flow->destination_port_be, flow->destination_link);
	remember_end(flow->destination_netns_cookie, &flow->destination, flow->destination_port_be,
		     &flow->source, flow->source_port_be, flow->source_link);
}

/* Tell of the end of a direct connection; false if the socket is not the client's end of one. */
static __always_inline bool end_direct(struct bpf_sock_ops *ops)
{
	struct connection connection = sockops_connection(ops);
	struct direct_flow *flow = own_flow(ops, &connection);
	struct flow_end *end;
	u32 zero = 0;
	u64 *lost;

	if (!flow)
		return false;
	end = ss_flow_end.lookup(&zero);
	if (end && ops->args[0] != BPF_TCP_SYN_SENT) {
		end->flow = *flow;
		end->ended_ns = bpf_ktime_get_ns();
		count_bytes(ops, end);
		if (ss_flow_ends.ringbuf_output(end, sizeof(*end), 0)) {
			lost = ss_lost.lookup(&zero);
			if (lost)
				__sync_fetch_and_add(lost, 1);
		}
	}
	if (ops->args[0] != BPF_TCP_LAST_ACK && ops->args[0] != BPF_TCP_SYN_SENT)
		remember_guarded(flow);
	ss_direct_flows.delete(&connection);
	return true;
}

static __always_inline void note_agent_flow(struct bpf_sock_ops *ops, u64 netns_cookie, u32 kind,
					    bool is_end)
{
	struct inbound_flow flow = sockops_flow(ops, netns_cookie);

	if (is_end)
		ss_agent_flows.delete(&flow);
	else
		ss_agent_flows.update(&flow, &kind);
}

/* Whether connect has steered the socket to our listener. */
static __always_inline bool is_steered(struct bpf_sock_ops *ops)
{
	struct address remote = sockops_remote(ops);

	return sockops_remote_port_be(ops) == bpf_htons(PORT_OUTBOUND) &&
	       address_is_loopback(&remote);
}

static __always_inline void note_origin(struct bpf_sock_ops *ops, struct origin *origin,
					bool is_end)
{
	struct source source = sockops_source(ops);

	if (is_end)
		ss_origin_flow.delete(&source);
	else
		ss_origin_flow.update(&source, origin);
}

#endif

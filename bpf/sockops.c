/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sockops on the root of cgroup v2. TCP_CONNECT_CB runs when the source port is known and before
 * the SYN leaves, so whoever accepts the connection finds its flow already published. The return
 * value cannot refuse a connection; a flow that could not be written is one that its reader does
 * not find, and both readers are closed then (a worker resets, lookup captures).
 */
#include "capture.h"

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

static __always_inline struct source sockops_source(struct bpf_sock_ops *ops)
{
	struct source source = {};

	source.netns_cookie = bpf_get_netns_cookie(ops);
	source.address = sockops_local(ops);
	source.port_be = bpf_htons(ops->local_port);
	return source;
}

static __always_inline struct agent_flow sockops_agent_flow(struct bpf_sock_ops *ops)
{
	struct agent_flow flow = {};
	u32 remote_port_be = ops->remote_port;

	flow.netns_cookie = bpf_get_netns_cookie(ops);
	flow.source = sockops_local(ops);
	flow.source_port_be = bpf_htons(ops->local_port);
	/* remote_port is in network order, in the upper half: shift in host order */
	flow.destination_port_be = bpf_htons((u16)bpf_ntohl(remote_port_be));
	return flow;
}

int ss_sockops(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct origin *origin;
	u32 one = 1;

	if (!sk || (ops->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ops->op != BPF_SOCK_OPS_STATE_CB))
		return 1;
	if (ops->op == BPF_SOCK_OPS_STATE_CB && ops->args[1] != BPF_TCP_CLOSE)
		return 1;

	if (ss_exempt.sk_storage_get(sk, 0, 0)) {
		struct agent_flow flow = sockops_agent_flow(ops);

		if (ops->op == BPF_SOCK_OPS_STATE_CB) {
			ss_agent_flows.delete(&flow);
			return 1;
		}
		ss_agent_flows.update(&flow, &one);
	} else {
		struct source source = sockops_source(ops);

		origin = ss_origin.sk_storage_get(sk, 0, 0);
		if (!origin)
			return 1;
		if (ops->op == BPF_SOCK_OPS_STATE_CB) {
			ss_origin_flow.delete(&source);
			return 1;
		}
		ss_origin_flow.update(&source, origin);
	}
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return 1;
}

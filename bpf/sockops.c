/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sockops on the root of cgroup v2. TCP_CONNECT_CB runs when the source port is known and before
 * the SYN leaves, so whoever accepts the connection finds its flow already published. The return
 * value cannot refuse a connection; a flow that could not be written is one that its reader does
 * not find, and both readers are closed then (a worker resets, lookup captures).
 */
#include "flow.h"

int ss_sockops(struct bpf_sock_ops *ops)
{
	bool is_end = ops->op == BPF_SOCK_OPS_STATE_CB, is_again = ops->op == BPF_SOCK_OPS_RTO_CB;
	u32 events = ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG;
	struct bpf_sock *sk = ops->sk;
	struct origin *origin;
	struct direct *direct;

	if (!sk || (ops->op != BPF_SOCK_OPS_TCP_CONNECT_CB && !is_end && !is_again))
		return 1;
	if (is_end && ops->args[1] != BPF_TCP_CLOSE && ops->args[1] != BPF_TCP_FIN_WAIT2)
		return 1;
	direct = ss_direct.sk_storage_get(sk, 0, 0);
	if (is_end && ops->args[1] == BPF_TCP_FIN_WAIT2) {
		if (direct)
			direct->received_at_fin_wait2 = ops->bytes_received;
		return 1;
	}

	if (is_again) {
		if (direct && publish_late(ops, direct))
			bpf_sock_ops_cb_flags_set(ops, events & ~BPF_SOCK_OPS_RTO_CB_FLAG);
		return 1;
	}

	/* Connect leaves the agent's sockets alone, so what is direct is not the agent's. */
	if (direct && direct->is_probe) {
		note_agent_flow(ops, direct->destination_netns_cookie, AGENT_FLOW_PROBE, is_end);
	} else if (direct) {
		if (is_end)
			end_direct(ops, direct);
		else if (!publish_direct(ops, direct))
			events |= BPF_SOCK_OPS_RTO_CB_FLAG;
	} else if (ss_exempt.sk_storage_get(sk, 0, 0)) {
		note_agent_flow(ops, bpf_get_netns_cookie(ops), AGENT_FLOW_DIALED, is_end);
	} else {
		origin = ss_origin.sk_storage_get(sk, 0, 0);
		if (!origin)
			return 1;
		note_origin(ops, origin, is_end);
	}
	if (!is_end)
		bpf_sock_ops_cb_flags_set(ops, events);
	return 1;
}

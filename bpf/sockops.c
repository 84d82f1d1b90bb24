/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sockops on the root of cgroup v2. TCP_CONNECT_CB runs when the source port is known and before
 * the SYN leaves, so whoever accepts the connection finds its flow already published. The return
 * value cannot refuse a connection; a flow that could not be written is one that its reader does
 * not find, and both readers are closed then (a worker resets, lookup captures).
 */
#include "flow.h"

/* Note begin or end of what the agent dials, or of what is steered to it; false if it is neither.
 */
static __always_inline bool note_carried(struct bpf_sock_ops *ops, struct bpf_sock *sk, bool is_end)
{
	struct origin *origin;

	if (ss_exempt.sk_storage_get(sk, 0, 0)) {
		note_agent_flow(ops, bpf_get_netns_cookie(ops), AGENT_FLOW_DIALED, is_end);
		return true;
	}
	origin = is_steered(ops) ? ss_origin.sk_storage_get(sk, 0, 0) : 0;
	if (!origin)
		return false;
	note_origin(ops, origin, is_end);
	return true;
}

static __always_inline bool note_probe(struct bpf_sock_ops *ops, struct bpf_sock *sk, bool is_end)
{
	u64 *probe = ss_probes.sk_storage_get(sk, 0, 0);

	if (!probe)
		return false;
	note_agent_flow(ops, *probe, AGENT_FLOW_PROBE, is_end);
	return true;
}

/* The SYN is about to leave: return what else sockops wants to hear of the connection. */
static __always_inline u32 begin(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	if (note_carried(ops, sk, false) || publish_direct(ops) || note_probe(ops, sk, false))
		return BPF_SOCK_OPS_STATE_CB_FLAG;
	return may_be_late(ops) ? BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG : 0;
}

static __always_inline void end(struct bpf_sock_ops *ops, struct bpf_sock *sk)
{
	if (!note_carried(ops, sk, true) && !end_direct(ops))
		note_probe(ops, sk, true);
}

int ss_sockops(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	u32 wanted;

	if (!sk)
		return 1;
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		wanted = begin(ops, sk);
		if (wanted)
			bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | wanted);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		if (ops->state == BPF_TCP_SYN_SENT && publish_direct(ops))
			bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags &
							       ~BPF_SOCK_OPS_RTO_CB_FLAG);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[1] == BPF_TCP_FIN_WAIT2)
			note_fin_wait2(ops);
		else if (ops->args[1] == BPF_TCP_CLOSE)
			end(ops, sk);
		break;
	}
	return 1;
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * cgroup/getpeername4 and getpeername6: the application sees the destination that it asked for. Not
 * gated by enrollment: a connection made while the pod was enrolled keeps its answer.
 *
 * Open on a failed lookup: the application then sees the listener's address, and nothing leaks.
 */
#include "capture.h"

static __always_inline struct origin *peer_origin(struct bpf_sock_addr *ctx, bool is_v6)
{
	struct origin *origin;
	struct source source = {};

	if (!ctx->sk)
		return 0;
	origin = ss_origin.sk_storage_get(ctx->sk, 0, 0);
	if (origin || ctx->user_port != bpf_htons(PORT_OUTBOUND))
		return origin;
	/* MPTCP: connect ran on the subflow, which has a storage of its own. */
	source.netns_cookie = bpf_get_netns_cookie(ctx);
	if (is_v6) {
		source.address.words_be[0] = CONTEXT_WORD(ctx->sk->src_ip6[0]);
		source.address.words_be[1] = CONTEXT_WORD(ctx->sk->src_ip6[1]);
		source.address.words_be[2] = CONTEXT_WORD(ctx->sk->src_ip6[2]);
		source.address.words_be[3] = CONTEXT_WORD(ctx->sk->src_ip6[3]);
	} else {
		source.address = address_from_v4(CONTEXT_WORD(ctx->sk->src_ip4));
	}
	source.port_be = bpf_htons(ctx->sk->src_port);
	return ss_origin_flow.lookup(&source);
}

int ss_getpeername4(struct bpf_sock_addr *ctx)
{
	struct origin *origin = peer_origin(ctx, false);

	if (origin) {
		ctx->user_ip4 = origin->address.words_be[3];
		ctx->user_port = origin->port_be;
	}
	return 1;
}

int ss_getpeername6(struct bpf_sock_addr *ctx)
{
	struct origin *origin = peer_origin(ctx, true);

	if (origin) {
		ctx->user_ip6[0] = origin->address.words_be[0];
		ctx->user_ip6[1] = origin->address.words_be[1];
		ctx->user_ip6[2] = origin->address.words_be[2];
		ctx->user_ip6[3] = origin->address.words_be[3];
		ctx->user_port = origin->port_be;
	}
	return 1;
}

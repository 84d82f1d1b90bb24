/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * cgroup/bind4 and bind6: a process of an enrolled pod cannot take the ports of our listeners, and
 * so cannot pose as the agent to its pod or to a peer. Its bind() fails with EPERM.
 */
#include "capture.h"

static __always_inline int may_bind(struct bpf_sock_addr *ctx)
{
	u64 netns_cookie = bpf_get_netns_cookie(ctx);
	__be16 port_be = ctx->user_port;

	if (port_be != bpf_htons(PORT_OUTBOUND) && port_be != bpf_htons(PORT_INBOUND) &&
	    port_be != bpf_htons(PORT_INBOUND_HBONE) && port_be != bpf_htons(PORT_DNS))
		return 1;
	if (!ss_pods.lookup(&netns_cookie))
		return 1;
	/* closed: only a socket that the agent marked as its own may */
	return ctx->sk && ss_exempt.sk_storage_get(ctx->sk, 0, 0) ? 1 : 0;
}

int ss_bind4(struct bpf_sock_addr *ctx)
{
	return may_bind(ctx);
}

int ss_bind6(struct bpf_sock_addr *ctx)
{
	return may_bind(ctx);
}

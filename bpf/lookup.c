/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sk_lookup, one link per enrolled netns: inbound capture. It runs for a SYN that looks for a
 * listener, never for the packets of a connection. The context knows no netns, so each pod has its
 * own copy with its cookie stamped over NETNS_COOKIE_MARK.
 */
#include "capture.h"
#include "count.h"

/* A connection that the agent dialed, or one of the direct path: both were judged before. */
static __always_inline bool is_known_flow(u64 netns_cookie, const struct address *local,
					  const struct address *remote, struct bpf_sk_lookup *ctx)
{
	struct connection connection =
		connection_between(local, bpf_htons(ctx->local_port), remote, ctx->remote_port);
	struct direct_flow *direct = ss_direct_flows.lookup(&connection);
	struct inbound_flow flow = {};

	if (direct && direct->destination_netns_cookie == netns_cookie)
		return true;
	flow.netns_cookie = netns_cookie;
	flow.source = *remote;
	flow.source_port_be = ctx->remote_port;
	flow.destination_port_be = bpf_htons(ctx->local_port);
	return ss_agent_flows.lookup(&flow);
}

int ss_lookup(struct bpf_sk_lookup *ctx)
{
	struct address local, remote;
	struct bpf_sock *listener;
	u64 netns_cookie;
	long error;

	/* NETNS_COOKIE_MARK: volatile, so that the constant stays one instruction to be patched */
	asm volatile("%0 = 0x51de57e9c00c1e55 ll" : "=r"(netns_cookie));

	if (ctx->protocol != IPPROTO_TCP || ctx->local_port == PORT_INBOUND_HBONE)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		local = address_from_v4(CONTEXT_WORD(ctx->local_ip4));
		remote = address_from_v4(CONTEXT_WORD(ctx->remote_ip4));
	} else {
		local.words_be[0] = CONTEXT_WORD(ctx->local_ip6[0]);
		local.words_be[1] = CONTEXT_WORD(ctx->local_ip6[1]);
		local.words_be[2] = CONTEXT_WORD(ctx->local_ip6[2]);
		local.words_be[3] = CONTEXT_WORD(ctx->local_ip6[3]);
		remote.words_be[0] = CONTEXT_WORD(ctx->remote_ip6[0]);
		remote.words_be[1] = CONTEXT_WORD(ctx->remote_ip6[1]);
		remote.words_be[2] = CONTEXT_WORD(ctx->remote_ip6[2]);
		remote.words_be[3] = CONTEXT_WORD(ctx->remote_ip6[3]);
	}
	/* The pod speaking to itself; its own address shows eth0 as interface, so compare. */
	if (address_is_loopback(&local) || address_is_equal(&local, &remote))
		return SK_PASS;
	if (is_excluded_port(netns_cookie, bpf_htons(ctx->local_port), DIRECTION_INBOUND))
		return SK_PASS;
	if (is_known_flow(netns_cookie, &local, &remote, ctx))
		return SK_PASS;

	listener = (struct bpf_sock *)ss_listeners.lookup(&netns_cookie);
	if (!listener) {
		count_capture(netns_cookie, DIRECTION_INBOUND, CAPTURE_REFUSE);
		return SK_DROP; /* closed: no agent listens, and the application must not answer */
	}
	error = bpf_sk_assign((void *)ctx, (void *)listener, 0);
	bpf_sk_release(listener);
	count_capture(netns_cookie, DIRECTION_INBOUND, error ? CAPTURE_REFUSE : CAPTURE_STEER);
	return error ? SK_DROP : SK_PASS; /* closed, for the same reason */
}

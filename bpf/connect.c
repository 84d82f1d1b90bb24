/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * cgroup/connect4 and connect6 on the root of cgroup v2: outbound capture. Also runs for MPTCP (on
 * the subflow) and for TCP Fast Open.
 *
 * The source is bound to the pod's own address before the rewrite, so that getsockname() shows what
 * it shows without us. It fails where the application bound the socket itself, and then its own
 * choice stands: the result is not needed.
 */
#include "capture.h"
#include "count.h"

/* Decide, and count what was decided about a pod. */
static __always_inline enum capture decide(struct bpf_sock_addr *ctx,
					   const struct address *destination, struct pod **pod,
					   struct endpoint *endpoint)
{
	enum capture decision = capture_connect(ctx, destination, pod, endpoint);

	if (*pod)
		count_capture(bpf_get_netns_cookie(ctx), DIRECTION_OUTBOUND, decision);
	return decision;
}

int ss_connect4(struct bpf_sock_addr *ctx)
{
	struct sockaddr_in source = {.sin_family = AF_INET};
	struct address destination;
	struct endpoint endpoint;
	struct pod *pod;

	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	destination = address_from_v4(ctx->user_ip4);
	switch (decide(ctx, &destination, &pod, &endpoint)) {
	case CAPTURE_PASS:
		return 1;
	case CAPTURE_DIRECT:
		ctx->user_ip4 = endpoint.address.words_be[3];
		ctx->user_port = endpoint.port_be;
		return 1;
	case CAPTURE_REFUSE:
		return 0; /* closed: without the origin it would go out in plain text or nowhere */
	case CAPTURE_STEER:
		break;
	}
	source.sin_addr.s_addr = pod->address4.words_be[3];
	bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source));
	ctx->user_ip4 = bpf_htonl(INADDR_LOOPBACK);
	ctx->user_port = bpf_htons(PORT_OUTBOUND);
	return 1;
}

int ss_connect6(struct bpf_sock_addr *ctx)
{
	struct sockaddr_in6 source = {.sin6_family = AF_INET6};
	struct address destination;
	struct endpoint endpoint;
	struct pod *pod;
	bool is_v4;

	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	destination.words_be[0] = ctx->user_ip6[0];
	destination.words_be[1] = ctx->user_ip6[1];
	destination.words_be[2] = ctx->user_ip6[2];
	destination.words_be[3] = ctx->user_ip6[3];
	switch (decide(ctx, &destination, &pod, &endpoint)) {
	case CAPTURE_PASS:
		return 1;
	case CAPTURE_DIRECT:
		ctx->user_ip6[0] = endpoint.address.words_be[0];
		ctx->user_ip6[1] = endpoint.address.words_be[1];
		ctx->user_ip6[2] = endpoint.address.words_be[2];
		ctx->user_ip6[3] = endpoint.address.words_be[3];
		ctx->user_port = endpoint.port_be;
		return 1;
	case CAPTURE_REFUSE:
		return 0; /* closed, as above */
	case CAPTURE_STEER:
		break;
	}
	is_v4 = address_is_v4(&destination);
	__builtin_memcpy(&source.sin6_addr, is_v4 ? &pod->address4 : &pod->address6,
			 sizeof(source.sin6_addr));
	bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source));
	/* A v4-mapped destination stays IPv4: ::ffff:127.0.0.1, since ::1 is another family. */
	ctx->user_ip6[0] = 0;
	ctx->user_ip6[1] = 0;
	ctx->user_ip6[2] = is_v4 ? V4_MAPPED_BE : 0;
	ctx->user_ip6[3] = is_v4 ? bpf_htonl(INADDR_LOOPBACK) : bpf_htonl(1);
	ctx->user_port = bpf_htons(PORT_OUTBOUND);
	return 1;
}

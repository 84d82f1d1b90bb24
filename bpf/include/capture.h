/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which outbound connection of a pod is captured, and where its original destination is kept. */
#ifndef SIDESTEP_CAPTURE_H
#define SIDESTEP_CAPTURE_H

#include "address.h"
#include "direct.h"
#include "maps.h"

/* The listeners in each enrolled pod; the numbers are those of ambient mesh. */
#define PORT_OUTBOUND	   15001
#define PORT_INBOUND	   15006
#define PORT_INBOUND_HBONE 15008
#define PORT_DNS	   15053

static __always_inline bool is_excluded_port(u64 netns_cookie, __be16 port_be, u16 direction)
{
	struct port port = {
		.netns_cookie = netns_cookie,
		.port_be = port_be,
		.direction = direction,
	};

	return ss_ports.lookup(&port) != 0;
}

/* Whether a pod reaches a destination without us: its own addresses, excluded networks and ports.
 */
static __always_inline bool is_bypassed(u64 netns_cookie, const struct address *destination,
					__be16 port_be)
{
	struct network network = {};

	network.prefix_bits = 32 + 64 + 128;
	network.netns_cookie = netns_cookie;
	network.address = *destination;
	return ss_bypass.lookup(&network) ||
	       is_excluded_port(netns_cookie, port_be, DIRECTION_OUTBOUND);
}

/* Decide on a connection of `*pod`; `endpoint` is where it goes if it is captured. */
static __always_inline enum capture capture_connect(struct bpf_sock_addr *ctx,
						    const struct address *destination,
						    struct pod **pod, struct endpoint *endpoint)
{
	struct origin *origin;
	u64 netns_cookie = bpf_get_netns_cookie(ctx);
	__be16 port_be = ctx->user_port;
	bool is_service, is_same_family, is_direct;

	*pod = ss_pods.lookup(&netns_cookie);
	if (!*pod) {
		remember_probe(ctx, destination);
		return CAPTURE_PASS;
	}
	if (ss_exempt.sk_storage_get(ctx->sk, 0, 0))
		return CAPTURE_PASS;

	/* A socket may connect again after a failure: forget where it wanted to go. */
	ss_origin.sk_storage_delete(ctx->sk);
	if (address_is_local_scope(destination) || is_bypassed(netns_cookie, destination, port_be))
		return CAPTURE_PASS;

	*endpoint = choose_endpoint(destination, port_be);
	is_service = !address_is_equal(&endpoint->address, destination);
	is_same_family = address_is_v4(&endpoint->address) == address_is_v4(destination);
	is_direct = is_same_family && may_go_direct(netns_cookie, endpoint);
	if (is_direct && !is_service)
		return CAPTURE_DIRECT;

	origin = ss_origin.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!origin)
		return CAPTURE_REFUSE;
	origin->address = *destination;
	origin->port_be = port_be;
	if (is_service) {
		origin->endpoint = endpoint->address;
		origin->endpoint_port_be = endpoint->port_be;
	}
	return is_direct ? CAPTURE_DIRECT : CAPTURE_STEER;
}

#endif

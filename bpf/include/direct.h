/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The direct path: two pods of one node, joined by the kernel alone once the agent has allowed it.
 * Both ends are known by their netns cookies, which nobody can forge, and nothing leaves the node.
 */
#ifndef SIDESTEP_DIRECT_H
#define SIDESTEP_DIRECT_H

#include "address.h"
#include "maps.h"

/*
 * Where a connection to `destination` goes: one of the endpoints if that is a service, else there.
 * The agent follows the choice, so that a service's connections spread evenly, whoever serves them.
 */
static __always_inline struct endpoint choose_endpoint(const struct address *destination,
						       __be16 port_be)
{
	struct endpoint endpoint = {.address = *destination, .port_be = port_be}, *chosen;
	struct service_port key = {.address = *destination, .port_be = port_be};
	u32 *count = ss_services.lookup(&key);

	if (!count || !*count)
		return endpoint;
	key.index = bpf_get_prandom_u32() % *count;
	chosen = ss_endpoints.lookup(&key);
	return chosen ? *chosen : endpoint;
}

/* Whether two pods and a port have a verdict of the current generation, and which that is. */
static __always_inline bool has_verdict(u64 source_netns_cookie, u64 destination_netns_cookie,
					const struct address *destination, __be16 port_be,
					u64 *generation)
{
	struct verdict_key key = {};
	u64 *current, *allowed;
	u32 zero = 0;

	key.source_netns_cookie = source_netns_cookie;
	key.destination_netns_cookie = destination_netns_cookie;
	key.port_be = port_be;
	key.is_v6 = !address_is_v4(destination);
	allowed = ss_verdicts.lookup(&key);
	current = ss_generation.lookup(&zero);
	if (!allowed || !current || *allowed != *current)
		return false;
	*generation = *allowed;
	return true;
}

/*
 * Whether a connection has a verdict of the current generation. Nothing is remembered of it:
 * sockops asks again, when the source is known as well. Closed on any failed lookup: the connection
 * then goes through the agent.
 */
static __always_inline bool may_go_direct(u64 source_netns_cookie, const struct endpoint *endpoint)
{
	struct local local = {.address = endpoint->address};
	struct resident *destination = ss_local.lookup(&local);
	u64 generation;

	return destination && has_verdict(source_netns_cookie, destination->netns_cookie,
					  &endpoint->address, endpoint->port_be, &generation);
}

/*
 * A probe of the kubelet is remembered for sockops, which lets it into the pod. The kubelet is
 * known by its cgroup, which no pod can enter, also not one with the host's network. Closed on a
 * failed lookup: the probe is then any plaintext client.
 */
static __always_inline void remember_probe(struct bpf_sock_addr *ctx,
					   const struct address *destination)
{
	struct local local = {.address = *destination};
	u64 cgroup_id = bpf_get_current_cgroup_id();
	struct resident *resident;
	u64 *probe;

	if (!ss_probers.lookup(&cgroup_id))
		return;
	ss_probes.sk_storage_delete(ctx->sk);
	resident = ss_local.lookup(&local);
	if (!resident)
		return;
	probe = ss_probes.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (probe)
		*probe = resident->netns_cookie;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What capture.h decides for a connect(), each reason by itself and what it leaves on the socket.
 */
#include "host.h"

#include "capture.h"

enum { COOKIE = 7, PEER_COOKIE = 8, PORT = 8080, ENDPOINT_PORT = 9090, KUBELET = 99 };
enum { PEER = 0x0a000001, ENDPOINT = 0x0a000002, LOOPBACK = 0x7f000001 };

/* What the maps hold for the test that runs; a socket has at most one entry in each storage. */
static struct {
	bool is_enrolled, is_exempt, is_bypassed, is_storage_full, is_local;
	u16 excluded_direction;
	bool is_excluded;
	u64 verdict, generation; /* 0: there is none */
	bool has_origin, has_probe;
	u32 endpoint_count; /* of a service that is asked for; 0: it is none */
	u16 asked_index;
	struct endpoint endpoint; /* what became of the decision */
	struct endpoint service_endpoint;
	struct pod pod;
	struct origin origin;
	u64 probe;
	u32 one;
	struct resident peer;
} world;

static struct pod *find_pod(u64 *cookie)
{
	return world.is_enrolled && *cookie == COOKIE ? &world.pod : NULL;
}

static u32 *find_exempt(void *socket, void *initial, int flags)
{
	return socket && !initial && !flags && world.is_exempt ? &world.one : NULL;
}

static u32 *find_bypass(struct network *key)
{
	bool is_whole = key->prefix_bits == 8 * (sizeof(*key) - sizeof(key->prefix_bits));

	CHECK(is_whole && key->netns_cookie == COOKIE && !key->pad);
	return world.is_bypassed ? &world.one : NULL;
}

static u32 *find_port(struct port *key)
{
	CHECK(key->netns_cookie == COOKIE && key->port_be == bpf_htons(PORT) && !key->pad);
	return world.is_excluded && key->direction == world.excluded_direction ? &world.one : NULL;
}

static struct resident *find_local(struct local *key)
{
	return world.is_local && address_is_v4(&key->address) ? &world.peer : NULL;
}

static u32 *find_service(struct service_port *key)
{
	CHECK(key->port_be == bpf_htons(PORT) && !key->index);
	return world.endpoint_count ? &world.endpoint_count : NULL;
}

static struct endpoint *find_endpoint(struct service_port *key)
{
	CHECK(key->port_be == bpf_htons(PORT));
	world.asked_index = key->index;
	return &world.service_endpoint;
}

static u32 *find_prober(u64 *cgroup_id)
{
	return *cgroup_id == KUBELET ? &world.one : NULL;
}

static u64 *find_verdict(struct verdict_key *key)
{
	u16 port = world.endpoint_count ? ENDPOINT_PORT : PORT;

	CHECK(key->source_netns_cookie == COOKIE);
	CHECK(key->destination_netns_cookie == PEER_COOKIE && key->port_be == bpf_htons(port));
	return world.verdict ? &world.verdict : NULL;
}

static u64 *find_generation(u32 *key)
{
	return !*key && world.generation ? &world.generation : NULL;
}

static struct origin *make_origin(void *socket, void *initial, int flags)
{
	CHECK(socket && !initial && flags == BPF_SK_STORAGE_GET_F_CREATE);
	world.has_origin = !world.is_storage_full;
	return world.is_storage_full ? NULL : &world.origin;
}

static int delete_origin(void *socket)
{
	CHECK(socket);
	world.has_origin = false;
	return 0;
}

static u64 *make_probe(void *socket, void *initial, int flags)
{
	CHECK(socket && !initial && flags == BPF_SK_STORAGE_GET_F_CREATE);
	world.has_probe = true;
	return &world.probe;
}

static int delete_probe(void *socket)
{
	CHECK(socket);
	world.has_probe = false;
	return 0;
}

/* An enrolled pod's socket that was steered before, and maps without a reason against it. */
static void begin(void)
{
	memset(&world, 0, sizeof(world));
	world.is_enrolled = world.has_origin = true;
	world.peer.netns_cookie = PEER_COOKIE;
	world.service_endpoint.address = address_from_v4(bpf_htonl(ENDPOINT));
	world.service_endpoint.port_be = bpf_htons(ENDPOINT_PORT);
	netns_cookie_of_test = COOKIE;
	cgroup_id_of_test = 1;
	random_of_test = 0;
	ss_pods.lookup = find_pod;
	ss_exempt.sk_storage_get = find_exempt;
	ss_bypass.lookup = find_bypass;
	ss_ports.lookup = find_port;
	ss_local.lookup = find_local;
	ss_services.lookup = find_service;
	ss_endpoints.lookup = find_endpoint;
	ss_probers.lookup = find_prober;
	ss_verdicts.lookup = find_verdict;
	ss_generation.lookup = find_generation;
	ss_origin.sk_storage_get = make_origin;
	ss_origin.sk_storage_delete = delete_origin;
	ss_probes.sk_storage_get = make_probe;
	ss_probes.sk_storage_delete = delete_probe;
}

static enum capture decide(u32 address)
{
	struct address destination = address_from_v4(bpf_htonl(address));
	struct bpf_sock socket = {};
	struct bpf_sock_addr context = {.user_port = bpf_htons(PORT)};
	struct pod *found;
	enum capture decision;

	context.sk = &socket;
	decision = capture_connect(&context, &destination, &found, &world.endpoint);
	CHECK(found == (world.is_enrolled ? &world.pod : NULL));
	return decision;
}

static void test_connection_of_a_pod_is_steered_and_remembered(void)
{
	begin();
	CHECK(decide(PEER) == CAPTURE_STEER);
	CHECK(world.has_origin);
	CHECK(world.origin.port_be == bpf_htons(PORT));
	CHECK(world.origin.address.words_be[3] == bpf_htonl(PEER));
	CHECK(address_is_v4(&world.origin.address));
}

static void test_others_are_left_alone(void)
{
	begin();
	world.is_enrolled = false;
	CHECK(decide(PEER) == CAPTURE_PASS);
	begin();
	world.is_exempt = true;
	CHECK(decide(PEER) == CAPTURE_PASS);
}

static void test_excluded_destination_passes_and_is_forgotten(void)
{
	begin();
	CHECK(decide(LOOPBACK) == CAPTURE_PASS);
	CHECK(!world.has_origin);
	begin();
	world.is_bypassed = true;
	CHECK(decide(PEER) == CAPTURE_PASS);
	CHECK(!world.has_origin);
	begin();
	world.is_excluded = true;
	world.excluded_direction = DIRECTION_OUTBOUND;
	CHECK(decide(PEER) == CAPTURE_PASS);
	CHECK(!world.has_origin);
}

static void test_port_excluded_inbound_is_captured_outbound(void)
{
	begin();
	world.is_excluded = true;
	world.excluded_direction = DIRECTION_INBOUND;
	CHECK(decide(PEER) == CAPTURE_STEER);
}

static void test_verdict_of_this_generation_goes_direct(void)
{
	begin();
	world.is_local = true;
	world.verdict = world.generation = 3;
	CHECK(decide(PEER) == CAPTURE_DIRECT);
	CHECK(!world.has_origin);
	CHECK(world.endpoint.address.words_be[3] == bpf_htonl(PEER));
	CHECK(world.endpoint.port_be == bpf_htons(PORT));
}

static void test_anything_less_goes_through_the_agent(void)
{
	begin();
	world.verdict = world.generation = 3; /* but the destination is on another node */
	CHECK(decide(PEER) == CAPTURE_STEER);
	begin();
	world.is_local = true;
	world.generation = 3; /* no verdict */
	CHECK(decide(PEER) == CAPTURE_STEER);
	begin();
	world.is_local = true;
	world.verdict = 2; /* of a generation before */
	world.generation = 3;
	CHECK(decide(PEER) == CAPTURE_STEER);
	begin();
	world.is_local = true;
	world.verdict = 3; /* and no generation can be read */
	CHECK(decide(PEER) == CAPTURE_STEER);
}

static void test_service_goes_direct_to_an_endpoint_and_keeps_its_name(void)
{
	begin();
	world.is_local = true;
	world.endpoint_count = 3;
	random_of_test = 5;
	world.verdict = world.generation = 3;
	CHECK(decide(PEER) == CAPTURE_DIRECT);
	CHECK(world.asked_index == 2);
	CHECK(world.endpoint.address.words_be[3] == bpf_htonl(ENDPOINT));
	CHECK(world.endpoint.port_be == bpf_htons(ENDPOINT_PORT));
	CHECK(world.has_origin);
	CHECK(world.origin.address.words_be[3] == bpf_htonl(PEER));
	CHECK(world.origin.port_be == bpf_htons(PORT));
}

static void test_agent_is_told_which_endpoint_was_chosen(void)
{
	begin();
	world.endpoint_count = 1;
	CHECK(decide(PEER) == CAPTURE_STEER);
	CHECK(world.origin.endpoint.words_be[3] == bpf_htonl(ENDPOINT));
	CHECK(world.origin.endpoint_port_be == bpf_htons(ENDPOINT_PORT));
}

static void test_socket_keeps_its_family(void)
{
	begin();
	world.is_local = true;
	world.endpoint_count = 1;
	world.service_endpoint.address.words_be[0] = bpf_htonl(0xfd000000);
	world.verdict = world.generation = 3;
	CHECK(decide(PEER) == CAPTURE_STEER);
}

static void test_probe_of_the_kubelet_is_remembered(void)
{
	begin();
	world.is_enrolled = false;
	world.is_local = true;
	CHECK(decide(PEER) == CAPTURE_PASS && !world.has_probe);
	cgroup_id_of_test = KUBELET;
	CHECK(decide(PEER) == CAPTURE_PASS && world.has_probe);
	CHECK(world.probe == PEER_COOKIE);
	world.is_local = false;
	CHECK(decide(PEER) == CAPTURE_PASS && !world.has_probe);
}

static void test_connection_that_cannot_be_remembered_is_refused(void)
{
	begin();
	world.is_storage_full = true;
	CHECK(decide(PEER) == CAPTURE_REFUSE);
	begin();
	world.is_storage_full = world.is_local = true; /* a service keeps its name, or is refused */
	world.endpoint_count = 1;
	world.verdict = world.generation = 3;
	CHECK(decide(PEER) == CAPTURE_REFUSE);
}

int main(void)
{
	test_connection_of_a_pod_is_steered_and_remembered();
	test_others_are_left_alone();
	test_excluded_destination_passes_and_is_forgotten();
	test_port_excluded_inbound_is_captured_outbound();
	test_verdict_of_this_generation_goes_direct();
	test_anything_less_goes_through_the_agent();
	test_service_goes_direct_to_an_endpoint_and_keeps_its_name();
	test_agent_is_told_which_endpoint_was_chosen();
	test_socket_keeps_its_family();
	test_probe_of_the_kubelet_is_remembered();
	test_connection_that_cannot_be_remembered_is_refused();
	return conclude();
}

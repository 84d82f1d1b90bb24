/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What address.h says of an address. */
#include "host.h"

#include "address.h"

static struct address v4(u8 a, u8 b, u8 c, u8 d)
{
	return address_from_v4(bpf_htonl((u32)a << 24 | b << 16 | c << 8 | d));
}

static struct address v6(u16 first, u16 second, u16 last)
{
	struct address address = {};

	address.words_be[0] = bpf_htonl((u32)first << 16 | second);
	address.words_be[3] = bpf_htonl(last);
	return address;
}

static void test_v4_is_kept_in_its_mapped_form(void)
{
	static const u8 expected[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1};
	struct address address = v4(192, 0, 2, 1);

	CHECK(!memcmp(address.bytes, expected, sizeof(expected)));
	CHECK(address_is_v4(&address));
	address = v6(0xfd00, 0, 1);
	CHECK(!address_is_v4(&address));
	/* ::192.0.2.1, the form that RFC 4291 2.5.5.1 gave up, is IPv6 */
	address = v4(192, 0, 2, 1);
	address.words_be[2] = 0;
	CHECK(!address_is_v4(&address));
	/* one bit beside the prefix */
	for (int bit = 0; bit < 96; bit++) {
		address = v4(192, 0, 2, 1);
		address.bytes[bit / 8] ^= 1 << bit % 8;
		CHECK(!address_is_v4(&address));
	}
}

static void test_every_bit_counts_when_compared(void)
{
	struct address address = v6(0xfd00, 7, 1), other = address;

	CHECK(address_is_equal(&address, &other));
	for (int bit = 0; bit < 128; bit++) {
		other = address;
		other.bytes[bit / 8] ^= 1 << bit % 8;
		CHECK(!address_is_equal(&address, &other));
	}
}

struct example {
	struct address address;
	bool is_loopback, is_local_scope;
};

static void test_what_never_leaves_the_pod_is_told(void)
{
	const struct example examples[] = {
		{v4(127, 0, 0, 1), true, true},
		{v4(127, 0, 0, 0), true, true},
		{v4(127, 255, 255, 255), true, true},
		{v4(126, 255, 255, 255), false, false},
		{v4(128, 0, 0, 0), false, false},
		{v4(0, 0, 0, 0), false, true},
		{v4(0, 0, 0, 1), false, false},
		{v4(10, 0, 0, 1), false, false},
		{v4(255, 255, 255, 255), false, false},
		{v6(0, 0, 1), true, true},
		{v6(0, 0, 0), false, true},
		{v6(0, 0, 2), false, false},
		{v6(0, 1, 1), false, false},
		{v6(0xfe80, 0, 1), false, true},
		{v6(0xfebf, 0xffff, 1), false, true},
		{v6(0xfec0, 0, 1), false, false},
		{v6(0xfe7f, 0xffff, 1), false, false},
		{v6(0xfd00, 0, 1), false, false},
		{v6(0xff02, 0, 1), false, false},
	};

	for (size_t i = 0; i < sizeof(examples) / sizeof(examples[0]); i++) {
		CHECK(address_is_loopback(&examples[i].address) == examples[i].is_loopback);
		CHECK(address_is_local_scope(&examples[i].address) == examples[i].is_local_scope);
	}
}

static void test_a_connection_has_one_key_from_both_ends(void)
{
	const struct {
		struct address first;
		u16 first_port;
		struct address second;
		u16 second_port;
	} examples[] = {
		{v4(10, 0, 0, 9), 80, v4(10, 0, 0, 1), 8080}, /* by port, whatever the addresses */
		{v4(10, 0, 0, 1), 256, v4(10, 0, 0, 1), 511}, /* as numbers */
		{v4(10, 0, 0, 1), 255, v4(10, 0, 0, 1), 256}, /* 0x00ff, 0x0100 */
		{v4(10, 0, 0, 255), 80, v4(10, 0, 1, 0), 80}, /* by address, as numbers too */
		{v6(0xfd00, 0, 2), 80, v6(0xfd00, 1, 1), 80},
		{v4(10, 0, 0, 1), 80, v6(0xfd00, 0, 1), 80},
	};

	for (size_t i = 0; i < sizeof(examples) / sizeof(examples[0]); i++) {
		__be16 first_port = bpf_htons(examples[i].first_port);
		__be16 second_port = bpf_htons(examples[i].second_port);
		struct address first = examples[i].first, second = examples[i].second;
		struct connection wanted = {first, second, first_port, second_port};
		struct connection one =
			connection_between(&first, first_port, &second, second_port);
		struct connection other =
			connection_between(&second, second_port, &first, first_port);

		CHECK(!memcmp(&one, &wanted, sizeof(wanted)));
		CHECK(!memcmp(&other, &wanted, sizeof(wanted)));
	}
}

int main(void)
{
	test_v4_is_kept_in_its_mapped_form();
	test_every_bit_counts_when_compared();
	test_what_never_leaves_the_pod_is_told();
	test_a_connection_has_one_key_from_both_ends();
	return conclude();
}

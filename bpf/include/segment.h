/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Headers of Ethernet, IP and TCP, and where in a packet they are. */
#ifndef SIDESTEP_SEGMENT_H
#define SIDESTEP_SEGMENT_H

#include "address.h"

#define ETHERTYPE_OFFSET     12
#define ETHERNET_BYTES	     14
#define ETHERTYPE_IPV4_BE    bpf_htons(0x0800)
#define ETHERTYPE_IPV6_BE    bpf_htons(0x86dd)
#define ETHERTYPE_VLAN_BE    bpf_htons(0x8100)
#define ETHERTYPE_QINQ_BE    bpf_htons(0x88a8)
#define IPV4_WITHOUT_OPTIONS 0x45	       /* version, and words of the header */
#define IPV4_FRAGMENT_BE     bpf_htons(0x3fff) /* more fragments, or an offset */
#define MAX_EXTENSIONS	     4
#define TCP_FLAG_SYN	     0x02
#define TCP_FLAG_ACK	     0x10

struct ipv4_head {
	u8 version_length;
	u8 service;
	__be16 length_be;
	u16 id;
	__be16 fragment_be;
	u8 ttl;
	u8 protocol;
	u16 checksum;
	__be32 source_be;
	__be32 destination_be;
};

struct ipv6_head {
	u32 version_flow;
	__be16 length_be;
	u8 next;
	u8 hops;
	struct address source;
	struct address destination;
};

struct tcp_head {
	__be16 source_be;
	__be16 destination_be;
	u32 sequence;
	u32 acknowledgment;
	u8 offset;
	u8 flags;
};

struct segment {
	struct address source; /* of any IP packet, as far as it can be read */
	struct address destination;
	u32 tcp_offset;	  /* in the packet; 0: not TCP */
	u32 end;	  /* of the packet, without padding */
	bool is_fragment; /* or what it carries cannot be seen for other reasons */
};

static __always_inline void parse_ipv4(struct __sk_buff *skb, struct segment *segment)
{
	struct ipv4_head ip;
	u32 length;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &ip, sizeof(ip)))
		return;
	segment->source = address_from_v4(ip.source_be);
	segment->destination = address_from_v4(ip.destination_be);
	if (ip.protocol != IPPROTO_TCP)
		return;
	segment->tcp_offset = ETHERNET_BYTES + (ip.version_length & 0xf) * 4;
	segment->is_fragment = ip.fragment_be & IPV4_FRAGMENT_BE;
	length = bpf_ntohs(ip.length_be);
	/* 0: larger than 64 KiB, joined by the kernel (BIG TCP) */
	segment->end = length ? ETHERNET_BYTES + length : skb->len;
}

static __always_inline void parse_ipv6(struct __sk_buff *skb, struct segment *segment)
{
	u32 offset = ETHERNET_BYTES + sizeof(struct ipv6_head), length;
	struct ipv6_head ip;
	u8 extension[2], next;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &ip, sizeof(ip)))
		return;
	segment->source = ip.source;
	segment->destination = ip.destination;
	length = bpf_ntohs(ip.length_be);
	segment->end = length ? offset + length : skb->len;
	next = ip.next;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			break;
		if (bpf_skb_load_bytes(skb, offset, extension, sizeof(extension)))
			break; /* cut off: whatever follows is in another fragment */
		segment->is_fragment |= next == IPPROTO_FRAGMENT;
		/* RFC 8200 4.5: the second byte of a fragment header is reserved, not a length */
		offset += next == IPPROTO_FRAGMENT ? 8 : (extension[1] + 1) * 8;
		next = extension[0];
	}
	if (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS ||
	    next == IPPROTO_FRAGMENT)
		segment->is_fragment =
			true; /* more headers than anybody needs: what do they hide? */
	else if (next != IPPROTO_TCP)
		return;
	segment->tcp_offset = offset;
}

#endif

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The one translation unit: every program shares the maps. */
#define BPF_LICENSE Dual BSD / GPL
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>

#include "connect.c"
#include "peername.c"
#include "bind.c"
#include "sockops.c"
#include "lookup.c"
#include "guard.c"

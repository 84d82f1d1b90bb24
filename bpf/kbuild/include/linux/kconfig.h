/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stands in for the kernel's own kconfig.h, which bcc forces into every compilation, so that no
 * kernel headers are needed on the node: the programs use UAPI types only (linux-libc-dev).
 */
#ifndef SIDESTEP_KCONFIG_H
#define SIDESTEP_KCONFIG_H

#undef __KERNEL__

/* bcc carries its own linux/bpf.h under this guard; the exported copy would double every enum. */
#define __LINUX_BPF_H__
#define CONFIG_BPF_SYSCALL 1
#define __user

#include <linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;

#define true 1
#define false 0

#endif

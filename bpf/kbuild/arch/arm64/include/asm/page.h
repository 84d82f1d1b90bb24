/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* bcc's helpers.h includes this name for PAGE_SIZE alone. */
#define PAGE_SIZE 4096

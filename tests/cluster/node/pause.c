/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The process that a pod's sandbox stands on: it waits until it is told to end. */
#include <signal.h>
#include <unistd.h>

static void end(int number)
{
	(void)number;
	_exit(0);
}

int main(void)
{
	signal(SIGTERM, end);
	signal(SIGINT, end);
	for (;;)
		pause();
}

/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Another wall clock for one program and its children, since the kernel has one for all.
 *
 * LD_PRELOAD this, and CLOCK_OFFSET names a file with an int64_t: the nanoseconds by which the
 * clock is ahead. The file is mapped, so that writing it is a jump of the clock, seen at once by
 * all who have it. Monotonic clocks stay, and what waits for a moment waits by the kernel's clock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL

static int (*real_clock)(clockid_t, struct timespec *);
static const volatile int64_t *offset;

__attribute__((constructor)) static void open_offset(void)
{
	const char *path = getenv("CLOCK_OFFSET");
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *mapped = MAP_FAILED;

	real_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
	if (fd >= 0)
		mapped = mmap(NULL, sizeof(*offset), PROT_READ, MAP_SHARED, fd, 0);
	if (mapped == MAP_FAILED)
		abort(); /* a drill with the right clock would show nothing */
	close(fd);
	offset = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int result;
	int64_t moment;

	if (!offset) /* another library's constructor was first */
		open_offset();
	result = real_clock(clock, now);
	if (result || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
		return result;
	moment = now->tv_sec * SECOND + now->tv_nsec + *offset;
	now->tv_sec = moment / SECOND;
	now->tv_nsec = moment % SECOND;
	return 0;
}

int gettimeofday(struct timeval *now, void *zone)
{
	struct timespec moment;

	(void)zone;
	clock_gettime(CLOCK_REALTIME, &moment);
	now->tv_sec = moment.tv_sec;
	now->tv_usec = moment.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *now)
{
	struct timespec moment;

	clock_gettime(CLOCK_REALTIME, &moment);
	if (now)
		*now = moment.tv_sec;
	return moment.tv_sec;
}

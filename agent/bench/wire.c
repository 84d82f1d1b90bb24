// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The load generator of the benchmark for what an HTTP client cannot measure: round trips, bulk,
 * new connections, idle connections, over plain TCP.
 *
 *   wire serve PORT                                echo and sink, until killed
 *   wire rtt ADDRESS PORT SECONDS SIZE             one connection, one message at a time
 *   wire bulk ADDRESS PORT SECONDS STREAMS         one way, client to server
 *   wire connect ADDRESS PORT SECONDS CLIENTS      connect, 64 bytes each way, close
 *   wire requests ADDRESS PORT SECONDS CONNECTIONS SIZE RATE   RATE 0: as fast as it goes
 *   wire idle ADDRESS PORT COUNT                   open, 64 bytes each way, wait for end of stdin
 *
 * A client prints one line of JSON. The first byte of a connection says what the server does with
 * the rest: 'E' sends everything back, 'C' does so once and closes, 'S' counts and answers with the
 * count after the FIN. So a bulk result counts what arrived at the application, not what left; and
 * TIME_WAIT, which is with who closes first, is at the server's well-known port and never uses up
 * the client's ports.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	BUFFER_BYTES = 256 * 1024,
	SMALL_BYTES = 64,
	MAX_CONNECTIONS = 1 << 17,
	MAX_SAMPLES = 1 << 22,
	STALL_SECONDS = 20,
};

struct connection {
	char mode; /* 0 until the first byte is there */
	uint64_t taken;
};

static struct connection connections[MAX_CONNECTIONS];
static char buffer[BUFFER_BYTES];

static struct sockaddr_in target;
static double duration;
static uint64_t ends_at;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

		if (sent < 0 && errno == EAGAIN) {
			struct pollfd wait = {.fd = fd, .events = POLLOUT};

			poll(&wait, 1, -1);
		} else if (sent < 0) {
			return; /* the reader will see the end */
		} else {
			data += sent;
			size -= sent;
		}
	}
}

/* Server ---------------------------------------------------------------------------------- */

static void serve_readable(int fd)
{
	struct connection *own = &connections[fd];
	ssize_t size = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
	char *data = buffer;

	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0) {
		if (size == 0 && own->mode == 'S')
			write_all(fd, (char *)&own->taken, sizeof(own->taken));
		close(fd);
		return;
	}
	if (!own->mode) {
		own->mode = *data++;
		size--;
	}
	own->taken += size;
	if (own->mode != 'S')
		write_all(fd, data, size);
	if (own->mode == 'C' && own->taken >= SMALL_BYTES)
		close(fd);
}

static void serve(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	struct epoll_event event = {.events = EPOLLIN}, found[64];
	int listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0), one = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 4096))
		die("listen");
	printf("ready\n");
	fflush(stdout);
	event.data.fd = listener;
	epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(epoll, found, 64, -1);

		for (int i = 0; i < count; i++) {
			int fd = found[i].data.fd;

			if (fd != listener) {
				serve_readable(fd);
				continue;
			}
			fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
			if (fd < 0 || fd >= MAX_CONNECTIONS)
				continue;
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
			connections[fd] = (struct connection){0};
			event.data.fd = fd;
			epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
		}
	}
}

/* Clients --------------------------------------------------------------------------------- */

static int dial(void)
{
	struct timeval patience = {.tv_sec = STALL_SECONDS};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;

	if (fd < 0)
		die("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (connect(fd, (struct sockaddr *)&target, sizeof(target)))
		die("connect");
	return fd;
}

static void read_all(int fd, char *data, size_t size)
{
	while (size) {
		ssize_t got = recv(fd, data, size, 0);

		if (got <= 0) {
			fprintf(stderr, "recv: %s\n",
				got ? strerror(errno) : "the connection ended");
			exit(1);
		}
		data += got;
		size -= got;
	}
}

static int by_value(const void *left, const void *right)
{
	uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

	return (a > b) - (a < b);
}

static void print_times(uint32_t *samples, size_t count, double seconds)
{
	if (!count) {
		fprintf(stderr, "nothing came back\n");
		exit(1);
	}
	qsort(samples, count, sizeof(*samples), by_value);
	printf("{\"count\": %zu, \"per_second\": %.1f, \"p50_us\": %.2f, \"p99_us\": %.2f}\n",
	       count, count / seconds, samples[count / 2] / 1e3,
	       samples[count - 1 - count / 100] / 1e3);
}

static uint32_t *samples;

static void measure_rtt(size_t size)
{
	int fd = dial();
	size_t count = 0;
	uint64_t began;

	write_all(fd, "E", 1);
	for (int i = 0; i < 20; i++) { /* the way is warm, as in a connection that is in use */
		write_all(fd, buffer, size);
		read_all(fd, buffer, size);
	}
	began = now();
	ends_at = began + duration * 1e9;
	for (uint64_t start = began, end; start < ends_at && count < MAX_SAMPLES; start = end) {
		write_all(fd, buffer, size);
		read_all(fd, buffer, size);
		end = now();
		samples[count++] = end - start;
	}
	print_times(samples, count, (now() - began) / 1e9);
}

/* A rate is kept by starting each connection's next request at its own time, never in a burst. */
static void measure_requests(int number, size_t size, int rate)
{
	uint64_t gap = rate ? number * 1000000000ull / rate : 0,
		 *due = calloc(number, sizeof(*due));
	struct epoll_event event = {.events = EPOLLIN}, found[64];
	uint64_t *started = calloc(number, sizeof(*started)), began;
	size_t *missing = calloc(number, sizeof(*missing)), count = 0;
	int *fds = calloc(number, sizeof(*fds)), epoll = epoll_create1(0);

	for (int i = 0; i < number; i++) {
		fds[i] = dial();
		write_all(fds[i], "E", 1);
		write_all(fds[i], buffer, size);
		read_all(fds[i], buffer, size);
		event.data.u32 = i;
		epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event);
	}
	began = now();
	ends_at = began + duration * 1e9;
	for (int i = 0; i < number; i++)
		due[i] = began + gap * i / number;
	while (now() < ends_at && count < MAX_SAMPLES - 64) {
		int ready;

		for (int i = 0; i < number; i++) {
			if (missing[i] || due[i] > now())
				continue;
			started[i] = now();
			due[i] += gap;
			missing[i] = size;
			write_all(fds[i], buffer, size);
		}
		ready = epoll_wait(epoll, found, 64, rate ? 1 : STALL_SECONDS * 1000);
		if (ready < 0 || (!ready && !rate))
			die("epoll_wait");
		for (int i = 0; i < ready; i++) {
			int at = found[i].data.u32;
			ssize_t got = recv(fds[at], buffer, missing[at], MSG_DONTWAIT);
			uint64_t end;

			if (got < 0 && errno == EAGAIN)
				continue;
			if (got <= 0)
				die("recv");
			missing[at] -= got;
			if (missing[at])
				continue;
			end = now();
			samples[count++] = end - started[at];
		}
	}
	print_times(samples, count, (now() - began) / 1e9);
}

static void *bulk_client(void *result)
{
	char *data = calloc(1, BUFFER_BYTES);
	int fd = dial();

	write_all(fd, "S", 1);
	while (now() < ends_at)
		write_all(fd, data, BUFFER_BYTES);
	shutdown(fd, SHUT_WR);
	read_all(fd, result, sizeof(uint64_t));
	close(fd);
	free(data);
	return NULL;
}

static void *connect_client(void *result)
{
	char data[SMALL_BYTES + 1] = "C", end;

	while (now() < ends_at) {
		int fd = dial();

		write_all(fd, data, sizeof(data));
		read_all(fd, data + 1, SMALL_BYTES);
		if (recv(fd, &end, 1, 0) != 0)
			die("end of the connection");
		close(fd);
		++*(uint64_t *)result;
	}
	return NULL;
}

static double run_clients(void *(*client)(void *), int number, uint64_t *total)
{
	pthread_t *threads = calloc(number, sizeof(*threads));
	uint64_t *results = calloc(number, sizeof(*results)), began = now();

	ends_at = began + duration * 1e9;
	for (int i = 0; i < number; i++)
		if (pthread_create(&threads[i], NULL, client, &results[i]))
			die("pthread_create");
	*total = 0;
	for (int i = 0; i < number; i++) {
		pthread_join(threads[i], NULL);
		*total += results[i];
	}
	return (now() - began) / 1e9;
}

static void measure_idle(int number)
{
	char data[SMALL_BYTES + 1] = "E";

	for (int i = 0; i < number; i++) {
		int fd = dial();

		write_all(fd, data, sizeof(data));
		read_all(fd, data + 1, SMALL_BYTES);
	}
	printf("{\"count\": %d}\n", number);
	fflush(stdout);
	while (read(0, data, sizeof(data)) > 0)
		;
}

int main(int count, char **words)
{
	struct rlimit files;
	uint64_t total;
	double seconds;
	int number;

	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	if (count == 3 && !strcmp(words[1], "serve"))
		serve(atoi(words[2]));
	if (count < 5) {
		fprintf(stderr, "wire: see the head of wire.c\n");
		return 2;
	}
	target.sin_family = AF_INET;
	target.sin_port = htons(atoi(words[3]));
	if (inet_pton(AF_INET, words[2], &target.sin_addr) != 1)
		die("address");
	samples = calloc(MAX_SAMPLES, sizeof(*samples));
	if (!strcmp(words[1], "idle")) {
		measure_idle(atoi(words[4]));
		return 0;
	}
	duration = atof(words[4]);
	number = count > 5 ? atoi(words[5]) : 1;
	if (number < 1 || (!strcmp(words[1], "rtt") && number > BUFFER_BYTES))
		return 2;
	if (!strcmp(words[1], "rtt")) {
		measure_rtt(number);
	} else if (!strcmp(words[1], "requests")) {
		measure_requests(number, count > 6 ? atoi(words[6]) : SMALL_BYTES,
				 count > 7 ? atoi(words[7]) : 0);
	} else if (!strcmp(words[1], "bulk")) {
		seconds = run_clients(bulk_client, number, &total);
		printf("{\"bytes\": %llu, \"gbit_s\": %.4f}\n", (unsigned long long)total,
		       total * 8 / seconds / 1e9);
	} else if (!strcmp(words[1], "connect")) {
		seconds = run_clients(connect_client, number, &total);
		printf("{\"count\": %llu, \"per_second\": %.1f}\n", (unsigned long long)total,
		       total / seconds);
	} else {
		return 2;
	}
	return 0;
}

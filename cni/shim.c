/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The CNI plugin that the container runtime runs: it hands the request to the node's agent and
 * prints the answer. Static, so that it needs nothing of the host.
 *
 *	request		"sidestep-cni 1\n", NAME=VALUE\0 for each CNI_ variable, \0, standard input
 *	answer		"0\n", or "1\n" and the error to print
 *
 * What must hold without an agent is decided here:
 *
 *	VERSION						answered here
 *	not of Kubernetes, or excluded namespace	passes: the result so far is printed
 *	no record of an installation			passes: the plugin was uninstalled
 *	DEL, GC						succeed, whatever comes of it
 *	ADD, CHECK, STATUS				fail; the kubelet tries again
 *
 * The result so far is printed as it came, to the byte.
 */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "json.h"

#define INPUT_BYTES  (1 << 20)
#define ANSWER_BYTES (1 << 16)
/* The kubelet waits for two minutes; the agent answers sooner, also when it has to say no. */
#define ANSWER_SECONDS 30
#define DELETE_SECONDS 5

/* CNI spec, "Error" */
enum {
	CODE_INVALID_ENVIRONMENT = 4,
	CODE_IO = 5,
	CODE_DECODE = 6,
	CODE_INVALID_CONFIG = 7,
	CODE_TRY_AGAIN = 11,
	CODE_NOT_AVAILABLE = 50,
};

#define CNI_VERSION   "1.1.0"
#define CNI_SUPPORTED "\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\""

static const char *const variables[] = {
	"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH",
};

static char input[INPUT_BYTES], answer[ANSWER_BYTES];
static struct json config;

static void print(const char *bytes, size_t size)
{
	while (size) {
		ssize_t done = write(STDOUT_FILENO, bytes, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			_exit(1);
		bytes += done;
		size -= done;
	}
}

static void print_text(const char *text)
{
	print(text, strlen(text));
}

/* Print a part of a JSON string that comes from the configuration or the system. */
static void print_quoted(const char *text, size_t size)
{
	for (size_t i = 0; i < size; i++)
		if ((unsigned char)text[i] >= ' ' && text[i] != '"' && text[i] != '\\')
			print(text + i, 1);
}

static void print_version(void)
{
	struct json version = json_member(config, "cniVersion");

	if (!json_is_null(version) && *version.start == '"')
		print(version.start, version.end - version.start);
	else
		print_text("\"" CNI_VERSION "\"");
}

/* Each part of the message is printed as text; `about` may be anything. */
static _Noreturn void fail(int code, const char *message, const char *about, size_t about_size,
			   const char *to_do)
{
	char digits[4] = {'0' + code / 10 % 10, '0' + code % 10, 0};

	print_text("{\"cniVersion\":");
	print_version();
	print_text(",\"code\":");
	print_text(code < 10 ? digits + 1 : digits);
	print_text(",\"msg\":\"sidestep: ");
	print_text(message);
	print_quoted(about, about_size);
	print_text(to_do);
	print_text("\"}\n");
	_exit(1);
}

static _Noreturn void fail_plainly(int code, const char *message)
{
	fail(code, message, "", 0, "");
}

/* Succeed without the agent, or with its consent. */
static _Noreturn void pass(const char *command, struct json previous)
{
	if (!strcmp(command, "ADD")) {
		print(previous.start, previous.end - previous.start);
		print_text("\n");
	}
	_exit(0);
}

static size_t read_all(void)
{
	size_t size = 0;
	ssize_t got;

	do {
		got = read(STDIN_FILENO, input + size, sizeof(input) - size);
		if (got > 0)
			size += got;
	} while ((got > 0 && size < sizeof(input)) || (got < 0 && errno == EINTR));
	if (got < 0)
		fail(CODE_IO, "standard input cannot be read: ", strerror(errno),
		     strlen(strerror(errno)), "");
	if (size == sizeof(input))
		fail_plainly(CODE_DECODE, "the network configuration is larger than 1 MiB");
	return size;
}

/* Return the value of a string member, 0-terminated; NULL if there is none. */
static char *copy_member(const char *name)
{
	struct json value = json_member(config, name);
	size_t size = value.end - value.start;
	char *copy;

	if (json_is_null(value) || *value.start != '"')
		return NULL;
	copy = malloc(size);
	if (!copy)
		fail_plainly(CODE_IO, "out of memory");
	memcpy(copy, value.start + 1, size - 2);
	copy[size - 2] = 0;
	return copy;
}

/* Find KEY=VALUE between semicolons in CNI_ARGS. */
static const char *find_argument(const char *arguments, const char *key, size_t *size)
{
	size_t length = strlen(key);

	while (arguments && *arguments) {
		size_t part = strcspn(arguments, ";");

		if (part > length && arguments[length] == '=' && !memcmp(arguments, key, length)) {
			*size = part - length - 1;
			return arguments + length + 1;
		}
		arguments += part + (arguments[part] == ';');
	}
	*size = 0;
	return NULL;
}

static int is_excluded(const char *namespace, size_t size)
{
	struct json list = json_member(config, "excludeNamespaces"), item = {NULL, NULL};

	while ((item = json_next(list, item)).start)
		if (json_equals(item, namespace, size))
			return 1;
	return 0;
}

/* A record that is not there, not one that cannot be read, says that all was uninstalled. */
static int is_uninstalled(void)
{
	char *record = copy_member("installedRecord");
	int is_gone = record && access(record, F_OK) && (errno == ENOENT || errno == ENOTDIR);

	free(record);
	return is_gone;
}

static int64_t now_milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int wait_for(int fd, short events, int64_t until)
{
	struct pollfd poller = {fd, events, 0};
	int64_t left;
	int ready;

	do {
		left = until - now_milliseconds();
		ready = left > 0 ? poll(&poller, 1, (int)left) : 0;
	} while (ready < 0 && errno == EINTR);
	if (!ready)
		errno = ETIMEDOUT;
	return ready > 0 ? 0 : -1;
}

static int send_all(int fd, const char *bytes, size_t size, int64_t until)
{
	while (size) {
		ssize_t done = send(fd, bytes, size, MSG_NOSIGNAL);

		if (done < 0 && errno == EAGAIN) {
			if (wait_for(fd, POLLOUT, until))
				return -1;
			continue;
		}
		if (done < 0)
			return -1;
		bytes += done;
		size -= done;
	}
	return 0;
}

static int send_request(int fd, size_t input_size, int64_t until)
{
	static const char magic[] = "sidestep-cni 1\n";

	if (send_all(fd, magic, sizeof(magic) - 1, until))
		return -1;
	for (size_t i = 0; i < sizeof(variables) / sizeof(*variables); i++) {
		const char *value = getenv(variables[i]);

		if (!value)
			continue;
		if (send_all(fd, variables[i], strlen(variables[i]), until) ||
		    send_all(fd, "=", 1, until) || send_all(fd, value, strlen(value) + 1, until))
			return -1;
	}
	if (send_all(fd, "", 1, until) || send_all(fd, input, input_size, until))
		return -1;
	return shutdown(fd, SHUT_WR);
}

static ssize_t receive_answer(int fd, int64_t until)
{
	size_t size = 0;

	while (size < sizeof(answer)) {
		ssize_t got = recv(fd, answer + size, sizeof(answer) - size, 0);

		if (got < 0 && errno == EAGAIN) {
			if (wait_for(fd, POLLIN, until))
				return -1;
			continue;
		}
		if (got < 0)
			return -1;
		if (!got)
			break;
		size += got;
	}
	return size;
}

/* Return the size of the agent's answer, or -1 with errno. */
static ssize_t ask(const char *path, size_t input_size, int seconds)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int64_t until = now_milliseconds() + seconds * 1000;
	int fd;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return -1;
	if (send_request(fd, input_size, until))
		return -1;
	return receive_answer(fd, until);
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND"), *namespace;
	size_t input_size, namespace_size;
	int is_cleanup, is_of_pod;
	struct json previous;
	ssize_t size;
	char *path;

	if (!command)
		fail_plainly(CODE_INVALID_ENVIRONMENT,
			     "CNI_COMMAND is missing: this is a CNI plugin, run by the "
			     "container runtime");
	if (!strcmp(command, "VERSION")) {
		input_size = read_all();
		config = json_text(input, input_size);
		print_text("{\"cniVersion\":");
		print_version();
		print_text(",\"supportedVersions\":[" CNI_SUPPORTED "]}\n");
		return 0;
	}
	is_cleanup = !strcmp(command, "DEL") || !strcmp(command, "GC");
	is_of_pod = !strcmp(command, "ADD") || !strcmp(command, "DEL") || !strcmp(command, "CHECK");
	if (!is_of_pod && !is_cleanup && strcmp(command, "STATUS"))
		fail(CODE_INVALID_ENVIRONMENT, "CNI_COMMAND is not known: ", command,
		     strlen(command), "");
	input_size = read_all();
	config = json_text(input, input_size);
	if (!config.start || *config.start != '{')
		fail_plainly(CODE_DECODE, "the network configuration is not a JSON object");
	previous = json_member(config, "prevResult");
	if (!strcmp(command, "ADD") && json_is_null(previous))
		fail_plainly(CODE_INVALID_CONFIG,
			     "there is no prevResult: this plugin comes after the one that makes "
			     "the interface, in the list \\\"plugins\\\" of a .conflist");
	namespace = find_argument(getenv("CNI_ARGS"), "K8S_POD_NAMESPACE", &namespace_size);
	if (is_of_pod && (!namespace || is_excluded(namespace, namespace_size)))
		pass(command, previous);
	if (is_uninstalled())
		pass(command, previous);
	path = copy_member("agentSocket");
	if (!path)
		fail_plainly(CODE_INVALID_CONFIG,
			     "agentSocket is missing from the plugin's entry: run sidestep cni "
			     "install again");

	size = ask(path, input_size, is_cleanup ? DELETE_SECONDS : ANSWER_SECONDS);
	if (is_cleanup || (size == 2 && !memcmp(answer, "0\n", 2)))
		pass(command, previous);
	if (size > 2 && !memcmp(answer, "1\n", 2)) {
		print(answer + 2, size - 2);
		return 1;
	}
	if (size < 0 && errno == ETIMEDOUT)
		fail(strcmp(command, "STATUS") ? CODE_TRY_AGAIN : CODE_NOT_AVAILABLE,
		     "the agent did not answer within 30 s at ", path, strlen(path),
		     "; see its log (the DaemonSet sidestep-agent on this node). The pod is not "
		     "started outside the mesh, the kubelet tries again");
	fail(strcmp(command, "STATUS") ? CODE_TRY_AGAIN : CODE_NOT_AVAILABLE,
	     "no agent answers at ", path, strlen(path),
	     "; is the DaemonSet sidestep-agent running on this node? The pod is not started "
	     "outside the mesh, the kubelet tries again. To let pods start without it: sidestep "
	     "cni uninstall, or list the namespace with --exclude-namespace");
}

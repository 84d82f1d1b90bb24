/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Find values in a JSON text without building anything: a value is the bytes from its first to its
 * last, so it can be handed on as it came. Every value that is passed over is checked against RFC
 * 8259, but for the digits of \u escapes and the bytes of UTF-8.
 *
 * No allocation and no library. Depth is bounded, since the text comes from elsewhere.
 */
#ifndef SIDESTEP_JSON_H
#define SIDESTEP_JSON_H

#include <stddef.h>

#define JSON_DEPTH 64

/* A value, or with `start` NULL none. */
struct json {
	const char *start;
	const char *end;
};

static const char *json_space(const char *at, const char *end)
{
	while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
		at++;
	return at;
}

/* Each of these returns what follows the thing at `at`, or NULL where there is no such thing. */

static const char *json_string(const char *at, const char *end)
{
	if (at >= end || *at != '"')
		return NULL;
	for (at++; at < end; at++) {
		if (*at == '"')
			return at + 1;
		if ((unsigned char)*at < ' ')
			return NULL;
		if (*at == '\\')
			at++;
	}
	return NULL;
}

static const char *json_digits(const char *at, const char *end)
{
	const char *first = at;

	while (at < end && *at >= '0' && *at <= '9')
		at++;
	return at > first ? at : NULL;
}

static const char *json_number(const char *at, const char *end)
{
	if (at < end && *at == '-')
		at++;
	if (at < end && *at == '0')
		at++;
	else
		at = json_digits(at, end);
	if (at && at < end && *at == '.')
		at = json_digits(at + 1, end);
	if (at && at < end && (*at == 'e' || *at == 'E')) {
		at++;
		if (at < end && (*at == '+' || *at == '-'))
			at++;
		at = json_digits(at, end);
	}
	return at;
}

static const char *json_word(const char *at, const char *end, const char *word)
{
	for (; *word; word++, at++)
		if (at >= end || *at != *word)
			return NULL;
	return at;
}

static const char *json_value(const char *at, const char *end, int depth);

static const char *json_members(const char *at, const char *end, char close, int depth)
{
	at = json_space(at, end);
	if (at < end && *at == close)
		return at + 1;
	while (1) {
		if (close == '}') {
			at = json_string(json_space(at, end), end);
			if (!at)
				return NULL;
			at = json_space(at, end);
			if (at >= end || *at++ != ':')
				return NULL;
		}
		at = json_value(json_space(at, end), end, depth);
		if (!at)
			return NULL;
		at = json_space(at, end);
		if (at >= end)
			return NULL;
		if (*at == close)
			return at + 1;
		if (*at++ != ',')
			return NULL;
	}
}

static const char *json_value(const char *at, const char *end, int depth)
{
	if (at >= end || depth >= JSON_DEPTH)
		return NULL;
	switch (*at) {
	case '{':
		return json_members(at + 1, end, '}', depth + 1);
	case '[':
		return json_members(at + 1, end, ']', depth + 1);
	case '"':
		return json_string(at, end);
	case 't':
		return json_word(at, end, "true");
	case 'f':
		return json_word(at, end, "false");
	case 'n':
		return json_word(at, end, "null");
	default:
		return json_number(at, end);
	}
}

/* Return the one value that a text is; none if it is anything else. */
static inline struct json json_text(const char *text, size_t size)
{
	const char *end = text + size, *start = json_space(text, end);
	const char *after = json_value(start, end, 0);

	if (!after || json_space(after, end) != end)
		return (struct json){NULL, NULL};
	return (struct json){start, after};
}

static inline int json_is_null(struct json value)
{
	return !value.start || *value.start == 'n';
}

/* Compare a string with another that needs no escape. */
static inline int json_equals(struct json value, const char *string, size_t size)
{
	if (!value.start || *value.start != '"' || (size_t)(value.end - value.start) != size + 2)
		return 0;
	for (size_t i = 0; i < size; i++)
		if (value.start[i + 1] != string[i])
			return 0;
	return 1;
}

/*
 * Go to the next item of a list that `json_text` found, first with `item` as none; then, at the
 * end, none.
 */
static inline struct json json_next(struct json list, struct json item)
{
	const char *at;

	if (!list.start || *list.start != '[')
		return (struct json){NULL, NULL};
	at = json_space(item.start ? item.end : list.start + 1, list.end);
	if (item.start && *at == ',')
		at = json_space(at + 1, list.end);
	if (*at == ']')
		return (struct json){NULL, NULL};
	return (struct json){at, json_value(at, list.end, 0)};
}

/* Return a member of an object that `json_text` found; of several the last, as Go has it. */
static inline struct json json_member(struct json object, const char *name)
{
	struct json found = {NULL, NULL}, key;
	const char *at;
	size_t size = 0;

	while (name[size])
		size++;
	if (!object.start || *object.start != '{')
		return found;
	at = json_space(object.start + 1, object.end);
	while (*at == '"') {
		key = (struct json){at, json_string(at, object.end)};
		/* The colon. */
		at = json_space(json_space(key.end, object.end) + 1, object.end);
		if (json_equals(key, name, size))
			found = (struct json){at, json_value(at, object.end, 0)};
		at = json_space(json_value(at, object.end, 0), object.end);
		if (*at == ',')
			at = json_space(at + 1, object.end);
	}
	return found;
}

#endif

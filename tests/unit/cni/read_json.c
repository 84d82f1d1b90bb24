/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Say what json.h finds in each line of input, for test_shim.py. */
#include <stdio.h>
#include <string.h>

#include "json.h"

/* A line is NAME, a tab, a text: print the member NAME of the text, or its items for an empty NAME.
 */
int main(void)
{
	static char line[1 << 20];

	while (fgets(line, sizeof(line), stdin)) {
		char *text = strchr(line, '\t');
		struct json whole, found = {NULL, NULL};

		if (!text)
			return 1;
		*text++ = 0;
		whole = json_text(text, strlen(text) - 1);
		if (!whole.start) {
			puts("invalid");
			continue;
		}
		if (*line) {
			found = json_member(whole, line);
			if (found.start)
				printf("%.*s", (int)(found.end - found.start), found.start);
		} else {
			while ((found = json_next(whole, found)).start)
				printf("<%.*s>", (int)(found.end - found.start), found.start);
		}
		putchar('\n');
	}
	return 0;
}

"""The commands of the command line: each module parses, delegates to a library, and prints."""

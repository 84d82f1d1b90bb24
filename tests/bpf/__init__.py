"""The programs on this machine's kernel, with real sockets in real namespaces."""

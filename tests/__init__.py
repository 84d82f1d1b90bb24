"""The tests: unit and property (no privilege), bpf and node (root, this machine's kernel)."""

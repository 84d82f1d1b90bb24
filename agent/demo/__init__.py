"""The demo: a lab, unmodified programs, one label, and the proof of what changed.

It claims nothing that it has not measured in the same run, on the wire between the nodes, in the
agents' logs, in the kernel's tables.
"""

"""The only user of bpf(2): compile and load, pins, maps, links, feature probes.

bcc runs in a short-lived child (`compiler`); everything else goes through libbpf (`libbpf`), so
that the agent stays small. `pins` opens what the child left and refuses what is not ours.
"""

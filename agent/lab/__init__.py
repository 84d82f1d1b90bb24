"""A small cluster on one Linux machine: nodes and pods as network namespaces, one real agent each.

Nothing in it is mocked: the same agent, programs, certificates and sockets as on a node. Nothing
of the machine's own network changes, and `down` leaves the machine as it was.
"""

"""Certificates: who signs them, who asks for them, what they prove.

    CA      service -> authority (signs) <- custody (keeps the key), tokens (who asks)
    agent   keeper -> rotation (when) and client (asks)
    worker  verify -> der (what a peer's certificate proves)

The only user of the `cryptography` package and of gRPC; what workers import uses neither.
"""

import os

# gRPC's core has a log of its own on stderr, set up as it is imported. It is no JSON, and what
# fails raises here as well.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

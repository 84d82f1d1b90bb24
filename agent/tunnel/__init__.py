"""HBONE: HTTP/2 CONNECT over mutual TLS, one tunnel for many pod connections.

`frames`, `streams`, `events` and `connection` are the core: bytes in, events out, no I/O and no
clock. The other modules are the shell that runs in a worker process and moves the bytes.
"""

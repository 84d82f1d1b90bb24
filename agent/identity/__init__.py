"""Certificates: who signs them, who asks for them. The only user of the `cryptography` package."""

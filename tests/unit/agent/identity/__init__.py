"""Certificates: the signing core, what is verified, when is asked, how the key is kept."""

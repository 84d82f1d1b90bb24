"""Beside a stock peer: Envoy speaks HBONE with our worker, both ways round."""

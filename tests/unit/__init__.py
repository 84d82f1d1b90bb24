"""Mirrors the source tree: one test file per module."""

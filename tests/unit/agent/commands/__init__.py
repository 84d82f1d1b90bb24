"""Tests of the tunnel, core first."""

"""Tests of agent/state."""

"""Unit tests of agent.lab."""

"""Unit tests of agent.datapath."""

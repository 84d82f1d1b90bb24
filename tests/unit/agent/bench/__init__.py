"""Tests of agent.bench."""

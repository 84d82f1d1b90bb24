"""Tests of agent/discovery."""

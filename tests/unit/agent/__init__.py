"""Tests of agent modules, without privilege."""

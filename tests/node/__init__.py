"""Agents and workers on this machine, with real traffic between pods."""

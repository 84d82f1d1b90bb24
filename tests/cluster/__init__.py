"""Against a real API server and its store."""

"""The CNI plugin."""

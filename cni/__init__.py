"""The CNI plugin: what the container runtime calls when a pod is made or deleted."""

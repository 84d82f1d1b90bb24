"""What Sidestep knows, as frozen values: identities, pods, workloads, services. Pure."""

"""Where state comes from: sources of Kubernetes objects, and their one translation to our model."""

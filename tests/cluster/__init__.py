"""A real one-node Kubernetes cluster, and what is tested on it. See README.md in this folder."""

"""The benchmark of the ops, and the static proof of their compiled kernels."""

"""CPU paths in plain torch, and the references that are too long to stand in the files of their kernels."""

"""Plain torch: CPU paths, and references too long to stand beside their kernels."""

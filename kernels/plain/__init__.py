"""What torch computes by itself: CPU paths, and references too long to stand beside their kernels."""

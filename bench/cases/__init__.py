"""Cases: definitions of ops, for the tests, the benchmark, and the compilation of all kernels without a GPU."""

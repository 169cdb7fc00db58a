"""Cases: the definition of each op for the tests, the static proof and the benchmark."""

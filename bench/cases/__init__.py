"""Cases: what the tests, the static proof and the benchmark know about each op."""

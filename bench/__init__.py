"""One registry of cases, floor 3, read by tests, the static proof and the benchmark."""

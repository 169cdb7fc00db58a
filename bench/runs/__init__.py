"""Measurements of whole runs: trainers, generation, several processes, the tests of a GPU, and conformance."""

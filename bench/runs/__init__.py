"""Whole runs: trainers, rollouts, several processes, and the conformance of any trainer."""

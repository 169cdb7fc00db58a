"""Whole runs: trainers, rollouts, processes, other people's trainers."""

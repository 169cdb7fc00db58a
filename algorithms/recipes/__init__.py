"""Recipes: sequences of training methods, each of which ends in a report page."""

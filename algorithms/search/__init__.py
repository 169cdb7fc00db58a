"""Computations without a gradient on several samples of one prompt."""

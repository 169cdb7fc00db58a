"""Losses, advantages and denominators as pure functions of tensors, each with its equation."""

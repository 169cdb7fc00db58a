"""Losses, advantages and denominators: pure functions of tensors, with their equations."""

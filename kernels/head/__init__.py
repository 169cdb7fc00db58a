"""Ops on a linear head that never hold its logits."""

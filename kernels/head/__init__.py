"""Ops on a linear head that never hold all of its logits in memory."""

"""Speed and proof of the ops."""

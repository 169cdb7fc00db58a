"""Algorithms, one per file: floor 2. Code that several algorithms share is in the subfolders, called rooms."""

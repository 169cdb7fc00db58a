"""One minimal transformer on the fused ops, floor 1, and the files it reads and writes."""

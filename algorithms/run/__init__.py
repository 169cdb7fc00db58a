"""A run around its loop: flags, folder, optimizer, checkpoints, processes, streams."""

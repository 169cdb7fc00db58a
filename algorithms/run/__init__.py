"""The parts of a run that all trainers share: flags, run folder, batches, optimizer, checkpoints, processes."""

"""Files, formats and folders on disk, read into plain records and tensors, and written. No file here builds a model."""

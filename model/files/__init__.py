"""Files, formats and folders on disk, read into dataclasses and tensors, and written. No file here builds a model."""

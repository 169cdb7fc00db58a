"""Files on disk, formats and folders: read into records and tensors, and written. No model is known here."""

"""What lies on disk: a Hugging Face folder's config, tensors and formats."""

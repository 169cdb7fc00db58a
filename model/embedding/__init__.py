"""Our ops inside other people's models."""

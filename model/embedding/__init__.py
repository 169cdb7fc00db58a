"""The parts of Burnish that run inside a model of transformers."""

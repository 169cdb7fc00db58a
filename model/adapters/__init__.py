"""The parts of an adapter that do not depend on a model."""

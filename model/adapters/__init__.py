"""The parts of an adapter that know nothing of the model that it stands on."""

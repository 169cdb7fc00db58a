"""The benchmark of the ops, the static proof (figures of their machine code), and measurements of whole runs."""

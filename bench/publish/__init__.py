"""Tables and pictures for README and docs, made from the figures that are stored in bench/."""

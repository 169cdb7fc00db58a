"""Compositions of methods, with the page that each writes."""

"""Tables and pictures that are made from kept figures."""

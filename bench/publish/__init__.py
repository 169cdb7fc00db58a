"""Tables and pictures from kept figures."""

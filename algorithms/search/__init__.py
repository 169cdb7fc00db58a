"""What needs no gradient: samples of one prompt, weighed against one another."""

"""Work without a gradient: several samples of one prompt, weighed against one another."""

"""One file, one algorithm, floor 2. What several of them share is in rooms."""

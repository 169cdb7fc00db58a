"""One file, one algorithm, floor 2. Files with an underscore are what several of them share."""

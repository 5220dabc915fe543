"""Products of few rows, and which kernel does which."""

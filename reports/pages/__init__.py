"""The pages and the terminal's tables."""

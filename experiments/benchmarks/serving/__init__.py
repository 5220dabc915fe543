"""Servers beside each other, in rounds."""

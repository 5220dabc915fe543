"""One cell, here or over HTTP, from a config to its files."""

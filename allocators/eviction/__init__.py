"""Which cached block goes first: one policy a file, called like the file (docs/strategies.md)."""

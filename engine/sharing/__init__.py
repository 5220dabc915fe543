"""Which requests of a step begin with the same blocks, and what of these is read once: host-only."""

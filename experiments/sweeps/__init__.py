"""Many cells: planned, run in rounds, one by one or on a cluster."""

"""kvarena on a Ray cluster, with plain Ray Serve: see docs/replicas.md."""

"""Routers: which of several replicas gets a request. One strategy, one file; contract: `kvarena.engine.routing`."""

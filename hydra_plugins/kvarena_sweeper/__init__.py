"""`hydra/sweeper=kvarena`. Hydra takes plugins from this package name alone."""

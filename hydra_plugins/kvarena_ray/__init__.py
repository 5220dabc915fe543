"""`hydra/launcher=ray`. Hydra takes plugins from this package name alone."""

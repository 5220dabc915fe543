"""From a config to an engine that is ready to run: model, pool, runner, strategy, requests, and the warm-up."""

"""The parts of the sampler: random streams, batch preparation, logit transforms and the result's way to the host."""

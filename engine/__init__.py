"""The engine: requests and step plans, the step loop, the KV pool, the model runner and the sampler.

Importing the package imports nothing else, so that `kvarena.engine.request`, `kvarena.engine.contract` and
`kvarena.engine.errors` stay free of torch for the allocators and schedulers that build on them.
"""

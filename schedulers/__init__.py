"""Who runs in the next step. Host-only: imports nothing but the engine's contract and the standard library.

`base` holds the mechanism, every other module one policy. A policy is registered by a file in `conf/scheduler/`.
"""

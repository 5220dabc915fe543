"""The OpenAI-compatible server around the engine.

    client -HTTP-> front process (tokenize, JSON, SSE) -socket-> engine process (steps only)
                              ^------------ supervisor (watch-dog, drain, exit code) ------------^

The supervisor starts one engine process and N fronts. Frames of msgpack travel over one socket pair per front:
requests in, one frame per step and front out. A page of shared memory holds the heart-beat and all metrics, so
`/health` and `/metrics` never enter the engine's queue.
"""

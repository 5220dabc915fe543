"""The OpenAI-compatible server around the engine.

    client -HTTP-> front process (tokenize, JSON, SSE) -socket-> engine process (steps only)
                              ^------------ supervisor (watch-dog, drain, exit code) ------------^

The supervisor starts the engines, most often one, and N fronts. Frames of msgpack travel over a socket pair for each
front and engine: requests in, one frame per step and front out. A page of shared memory holds the heart-beats and all
metrics, so `/health` and `/metrics` never enter an engine's queue.
"""

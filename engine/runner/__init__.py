"""Model runners: what turns a step plan into tokens.

`base` holds the interface (free of torch), `torch_runner` computes, `simulated` answers from a cost model.
"""

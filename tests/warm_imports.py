"""What a run, a sweep, a study, a server's engine and its fronts import: see warm.py."""

import importlib

from engine.importing import importing

MODULES = (
    "engine.server.compiled",
    "engine.server.front",
    "experiments.building.build",
    "experiments.building.warm_up",
    "experiments.cli",
    "experiments.entry",
    "experiments.job",
    "experiments.serving.serve",
    "experiments.serving.stub_engine",
    "experiments.studies.run",
    "experiments.sweep",
)

with importing():
    for module in MODULES:
        importlib.import_module(module)
    # transformers imports a class when it is asked for.
    importlib.import_module("engine.checkpoints.tokenizer").load_tokenizer("models/demo")

"""What a run, a sweep, a study, a server's engine and its fronts import: see warm.py."""

import importlib

from kvarena.engine.importing import importing

MODULES = (
    "kvarena.engine.server.engine.compiled",
    "kvarena.engine.server.processes.front",
    "kvarena.experiments.building.build",
    "kvarena.experiments.building.warm_up",
    "kvarena.experiments.cli",
    "kvarena.experiments.entry",
    "kvarena.experiments.jobs.job",
    "kvarena.experiments.serving.serve",
    "kvarena.experiments.serving.stub_engine",
    "kvarena.experiments.studies.run",
    "kvarena.experiments.sweeps.sweep",
)

with importing():
    for module in MODULES:
        importlib.import_module(module)
    # transformers imports a class when it is asked for.
    importlib.import_module("kvarena.engine.checkpoints.tokenizer").load_tokenizer("models/demo")

"""Workloads: what is asked of an engine, token by token. Free of torch, of the engine and of strategies.

A workload is made by Hydra from conf/workload/NAME.yaml and yields `WorkloadItem`s. Everything is drawn from one seed,
so every strategy gets the same prompts, output lengths and arrival times.
"""

from kvarena.experiments.workloads.parts.base import LengthTable, Workload, WorkloadItem

__all__ = ["LengthTable", "Workload", "WorkloadItem"]

"""Workloads, arrivals, the driver, measurements, sweeps and paper reproductions."""

import os

# OpenMP reads this when torch is loaded, so it is set before any module of this package can import torch. Its threads
# otherwise spin while they wait for one another; on a machine with any other load a step of a small model then takes
# ten times as long. An explicit setting of the user's is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

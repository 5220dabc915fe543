"""Workloads, arrivals, the driver, measurements, sweeps and paper reproductions."""

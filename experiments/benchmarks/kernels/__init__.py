"""Kernels timed one by one against the memory's bandwidth."""

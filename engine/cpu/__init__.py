"""Kernels for CPUs, compiled by numba when first needed."""

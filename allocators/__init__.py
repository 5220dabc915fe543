"""Allocators: who owns which KV slots. Host-only: they never import torch and never see a tensor.

One class per idea, one file in `conf/allocator` per strategy. The contract is `kvarena.engine.contract.KVAllocator`.
"""

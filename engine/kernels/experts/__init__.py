"""A layer's experts: routing, the sort of its pairs, two grouped products, and their sum (docs/gpu.md, Experts)."""

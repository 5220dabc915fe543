"""Fused decoder layers over the weights of transformers' modules, chosen by the modules' shape."""

"""One engine over several ranks: one plan a step, which every rank applies to its part of the model."""

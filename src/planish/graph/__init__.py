"""One graph: a model captured by torch.export, its groups of coupled units, and surgery on it."""

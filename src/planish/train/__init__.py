"""Training a captured graph in place: one loop, its schedule, averaging, and batch-norm recalibration."""

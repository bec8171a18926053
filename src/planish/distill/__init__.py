"""Distillation: the original teaches what was made of it, with labels or without."""

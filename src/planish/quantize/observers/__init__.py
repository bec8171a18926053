"""Observers, one file each: how the range of a tensor is chosen."""

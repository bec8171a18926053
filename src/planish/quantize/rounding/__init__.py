"""Rounding methods, one file each: they choose the grid point that stands for each weight."""

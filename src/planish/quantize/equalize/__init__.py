"""Equalization, one file each: channels are scaled against each other before rounding, so that they share a grid better; exact in float."""

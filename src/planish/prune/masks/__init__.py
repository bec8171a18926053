"""Masks: single weights that are zero, anywhere or N of every M kept; the shapes stay, so that no runtime here computes less."""

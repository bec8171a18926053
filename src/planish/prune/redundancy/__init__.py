"""Clusterings of units, one file each; found by name in the registry."""

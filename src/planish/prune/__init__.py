"""Structured pruning: which units and blocks can go, what that costs in loss, the surgery that a plan asks for, and its compensation."""

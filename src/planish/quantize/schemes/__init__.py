"""Schemes, one file each: how an operator computes, what its weight is kept in, and when that pays."""

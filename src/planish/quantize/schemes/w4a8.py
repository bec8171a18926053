"""Weights of four bits in static int8 arithmetic."""

from planish.quantize.contract import Scheme

W4A8 = Scheme("w4a8", frozenset({"conv", "linear", "matmul"}), 4, "static")
"""For processors that multiply int4 with int8. Runtimes on CPUs have no such kernel: they run it as int8, in as much time and as many bytes,
and so planish offers it nowhere unasked.
"""

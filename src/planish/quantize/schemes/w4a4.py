"""Weights and activations of four bits in static int8 arithmetic."""

from planish.quantize.contract import Scheme

W4A4 = Scheme("w4a4", frozenset({"conv", "linear", "matmul"}), 4, "static", activation_bits=4)
"""For processors that multiply int4 with int4, once the net was trained in it: plain rounding to 16 steps loses most of a small net. The first and the
last operator are better left in int8. Runtimes on CPUs have no such kernel: they run it as int8, in as much time and as many bytes, and so planish
offers it nowhere unasked.
"""

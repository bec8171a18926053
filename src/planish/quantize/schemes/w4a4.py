"""Weights and activations of four bits in static int8 arithmetic."""

from planish.quantize.contract import Scheme

W4A4 = Scheme("w4a4", frozenset({"conv", "linear", "matmul"}), 4, "static", activation_bits=4)
"""For processors that multiply int4 with int4. The first and the last operator are better left in int8, and what an addition reads beside has 8 bits
anyway; so ResNet-20 loses 0.8 points before it is trained, and 0.3 to 0.5 after 20,000 to 30,000 images. Runtimes on CPUs have no such kernel: they run it as int8, in as much time and as many bytes, and so planish
offers it nowhere unasked.
"""

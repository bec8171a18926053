"""Static int8: weights per output channel, activations in ranges that were seen on calibration data."""

from planish.quantize.contract import Scheme

INT8 = Scheme("int8", frozenset({"conv", "conv_transpose", "linear", "matmul", "attention"}), 8, "static")
"""Values are rounded once and stay int8 between operators: the quickest form of convolutions wherever int8 dot products exist. What lies
outside the calibrated ranges is clipped, so that activations with rare large values (a Transformer's) lose most.
"""

"""Weights in int4 with a scale for every 32 inputs, activations in float: a seventh of the bytes."""

from planish.quantize.contract import Scheme

INT4_WEIGHTS = Scheme("int4-weights", frozenset({"linear", "matmul"}), 4, "float", group=32)
"""For language models whose weights are read once for each token; plain rounding loses too much in small nets, where GPTQ helps most."""

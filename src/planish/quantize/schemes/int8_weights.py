"""Weights in int8, activations in float: a quarter of the bytes at hardly any loss."""

from planish.quantize.contract import Scheme

INT8_WEIGHTS = Scheme("int8-weights", frozenset({"linear", "matmul", "embedding"}), 8, "float", group=128)
"""Quicker only where reading the weights is what takes the time (one token through a large matrix). Of an embedding only the rows that are
looked up are turned to float.
"""

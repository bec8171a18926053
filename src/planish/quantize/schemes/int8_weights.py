"""Weights in int8, activations in float: a quarter of the bytes at hardly any loss."""

from planish.quantize.contract import Scheme

INT8_WEIGHTS = Scheme("int8-weights", frozenset({"linear", "matmul", "embedding", "lstm", "gru"}), 8, "float", group=128)
"""Quicker only where reading the weights is what takes the time (one token through a large matrix). Of an embedding only the rows that are
looked up are turned to float. The weights of an LSTM or a GRU become float when the model is loaded: the file is smaller, calls take what they took.
"""

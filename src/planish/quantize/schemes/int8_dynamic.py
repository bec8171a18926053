"""Dynamic int8: weights per output channel, activations in the range that each call has."""

from planish.quantize.contract import Scheme

INT8_DYNAMIC = Scheme("int8-dynamic", frozenset({"linear", "matmul", "lstm"}), 8, "dynamic")
"""No value is ever clipped and no calibration can be wrong; each call pays for a pass that finds the range. What a Transformer's linear maps
take best. The range is that of the whole tensor: with a batch, of all of its samples together. An LSTM's input has one range for the whole
sequence, its hidden state one for each step. No runtime has such a GRU.
"""

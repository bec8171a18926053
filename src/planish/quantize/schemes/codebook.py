"""Weights that share sixteen values, in float arithmetic: an eighth of the bytes for any operator, and no time lost or won."""

from planish.quantize.contract import Scheme

CODEBOOK = Scheme("codebook", frozenset({"conv", "conv_transpose", "linear", "matmul"}), 4, "float", codebook="kmeans")
"""K-means puts the values where they err least: closer than sixteen even steps. Runtimes restore the weights while they load a file, so that
it is the file alone that is smaller.
"""

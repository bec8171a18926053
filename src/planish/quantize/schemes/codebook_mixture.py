"""Weights that share sixteen values, the means of a mixture of Gaussians."""

from planish.quantize.contract import Scheme

CODEBOOK_MIXTURE = Scheme("codebook-mixture", frozenset({"conv", "conv_transpose", "linear", "matmul"}), 4, "float", codebook="mixture")
"""EM puts values where weights are dense, K-means where that saves squares: with rare large weights the mixture spends fewer values on them."""

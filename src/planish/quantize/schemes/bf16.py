"""bfloat16 for whatever stays in floating point: half the bits of fp32, all of its range."""

from planish.quantize.contract import Scheme

BF16 = Scheme("bf16", frozenset(), 16, "float", needs="has_bf16")
"""It is no choice for one operator: OpenVINO computes all floating-point operators of a net so, or none, where the processor multiplies bf16
(AVX-512 BF16, AMX). Norms, softmax and the products of attention gain with the rest. Elsewhere it is refused: the runtime would ignore it.
"""

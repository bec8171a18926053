"""Bit operations: multiply-accumulates weighed by the widths of what they multiply, the literature's figure for pruning and precision together."""

from __future__ import annotations

from collections.abc import Mapping

from planish.graph.graph import Analysis
from planish.graph.macs import operator_macs
from planish.plan import FULL_PRECISION
from planish.quantize.contract import scheme_named

_FLOAT_BITS = {FULL_PRECISION: 32, "bf16": 16}


def bit_operations(analysis: Analysis, precisions: Mapping[str, str] | None = None, floats: str = FULL_PRECISION) -> int:
    """MACs times the bits of both factors, summed over the operators, at the example's batch.

    It says what a plan asks for, not what a machine does: kernels for 4 bits compute in 8.

    Args:
        analysis: of the net as it computes, after pruning.
        precisions: operator name -> scheme, of those that left full precision.
        floats: what the rest computes in, "fp32" or "bf16".

    References: van Baalen et al., Bayesian Bits, 2020, section 4.
    """
    total = 0
    for name, operator in analysis.operators.items():
        scheme = scheme_named((precisions or {}).get(name, FULL_PRECISION))
        values = _FLOAT_BITS[floats] if scheme.activations == "float" else scheme.activation_bits
        weights = _FLOAT_BITS[floats] if scheme.name == FULL_PRECISION else scheme.weight_bits
        total += operator_macs(operator) * values * (weights if operator.weight is not None else values)
    return total

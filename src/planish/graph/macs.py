"""Multiply-accumulate operations of operators and programs, at any widths, at the example's batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from planish.graph.graph import Analysis, Operator


def operator_macs(operator: Operator, widths: Mapping[str, int] | None = None) -> int:
    """The multiply-accumulates of one operator when groups keep `widths` units; 0 for what multiplies no matrices.

    Biases, norms, softmax and element-wise maps count for nothing, as is customary.
    """
    at = dict(widths or {})
    inputs = [[size.at(at) for size in shape] for shape in operator.inputs]
    output = [size.at(at) for size in operator.output]
    weights = [[size.at(at) for size in shape] for shape in operator.weights]
    if operator.kind == "conv":
        kernel = weights[0] if weights else inputs[1]
        moving = inputs[0] if operator.attributes.get("transposed") else output
        return math.prod(moving) * math.prod(kernel[1:])
    if operator.kind == "linear":
        return math.prod(output) * (weights[0] if weights else inputs[1])[1]
    if operator.kind == "matmul":
        if "equation" in operator.attributes:
            return _einsum_macs(operator.attributes["equation"], [*inputs, *weights])
        first = weights[-1] if operator.attributes.get("weight_first") else inputs[0] if weights or len(inputs) < 3 else inputs[1]
        return math.prod(output) * first[-1]
    if operator.kind == "attention":
        query, key, value = inputs[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if operator.kind in ("lstm", "gru"):
        return math.prod(inputs[0][:-1]) * (math.prod(weights[0]) + math.prod(weights[1]))
    return 0


def _einsum_macs(equation: str, operands: list[list[int]]) -> int:
    """One product per combination of all letters; operands are matched to terms by their rank and the sizes already known."""
    sizes: dict[str, int] = {}
    for term in equation.partition("->")[0].split(","):
        for operand in operands:
            if len(operand) == len(term) and all(sizes.get(letter, size) == size for letter, size in zip(term, operand, strict=True)):
                sizes.update(zip(term, operand, strict=True))
                operands.remove(operand)
                break
    return math.prod(sizes.values())


def macs(analysis: Analysis, widths: Mapping[str, int] | None = None) -> int:
    """The multiply-accumulates of the whole program at the example's batch."""
    return sum(operator_macs(operator, widths) for operator in analysis.operators.values())

"""Bit operations: what a plan multiplies, in bits."""

from __future__ import annotations

import torch
from torch import nn

from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.quantize.bits import bit_operations


class Products(nn.Module):
    """A convolution, a linear map, and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).transpose(1, 2)
        return torch.matmul(self.out(y), y.transpose(1, 2))


def test_each_operator_counts_the_bits_of_both_factors() -> None:
    analysis = analyse(capture(Products(), (torch.zeros(2, 3, 5),)))
    conv, out, product = analysis.operators
    each = {conv: 2 * 5 * 3 * 4, out: 2 * 5 * 4 * 4, product: 2 * 5 * 5 * 4}
    assert bit_operations(analysis) == 1024 * macs(analysis) == 1024 * sum(each.values())
    assert bit_operations(analysis, floats="bf16") == 256 * macs(analysis)
    mixed = {conv: "w4a4", out: "int4-weights", product: "int8"}
    assert bit_operations(analysis, mixed) == 16 * each[conv] + 4 * 32 * each[out] + 64 * each[product]
    assert bit_operations(analysis, {out: "int8-dynamic"}) == 1024 * (each[conv] + each[product]) + 64 * each[out]

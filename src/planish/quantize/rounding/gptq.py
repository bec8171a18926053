"""Rounding by second order: column after column, and the columns behind make up for the error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from planish.graph.fake_quantize import along_groups
from planish.graph.moments import root_of_inverse
from planish.quantize.arithmetic import GroupQuantizer
from planish.quantize.contract import Layer, Outputs, Rounded


class Gptq:
    """Optimal brain quantization in one order of the columns for all rows, which then share the inverse Hessian of the columns that are left.

    With H = E[x x^T] + lambda I and U^T U = H^-1 (U upper triangular), a column i that was rounded with error e is made up for by
    e U_ij / U_ii in each column j behind it. Updates within a block of columns are made at once, those behind it when it is done.

    Args:
        damping: lambda as a share of H's mean diagonal.
        block: columns of a block, about: blocks end where groups do.
        is_ordered: whether the inputs of most power come first. Groups then keep the scales of the weights as they were; else each group
            gets the scale that the observer chooses for its weights as they are when it is reached. On inputs of unequal power the order
            is worth more: a third of the error where power grows along the columns; and it is quicker.
        rows: that are rounded at a time, in double precision, where the inputs come in an order of their own; it changes no number.

    References: Frantar et al., GPTQ, 2023, algorithm 1 and section 4.1; activation order is of the authors' code.
    Differs: an input that is always zero keeps its weights, rounded to nearest, where the authors zero them; damping is ten times as much
        where round-off leaves the Hessian indefinite.
    """

    needs: frozenset[str] = frozenset({"moments"})

    def __init__(self, damping: float = 0.01, block: int = 128, is_ordered: bool = True, rows: int = 4096) -> None:
        self.damping, self.block, self.is_ordered, self.rows = damping, block, is_ordered, rows

    def rounded(self, layers: Sequence[Layer], outputs: Outputs | None, generator: torch.Generator) -> list[Rounded]:
        return [self._ordered(layer) if self.is_ordered else self._in_place(layer) for layer in layers]

    def _in_place(self, layer: Layer) -> Rounded:
        """In the order of the columns."""
        assert layer.gram is not None
        found, scale, zero_point = self._by_columns(layer, root_of_inverse(layer.gram, self.damping), _Steps(layer))
        return _on_grid(layer, found, dataclasses.replace(layer.quantizer, scale=scale, zero_point=zero_point))

    def _ordered(self, layer: Layer) -> Rounded:
        """In the order of the inputs' power, summed over systems."""
        assert layer.gram is not None
        order = layer.gram.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True, stable=True)
        upper = root_of_inverse(layer.gram[:, order[:, None], order], self.damping)  # before there is more: it takes the most memory
        quantizer, (rows, columns) = layer.quantizer, layer.weight.shape
        found = torch.empty_like(layer.weight)
        most = self.rows if len(upper) == 1 else rows
        for some in (slice(start, start + most) for start in range(0, rows, most)):
            own = GroupQuantizer(quantizer.grid, quantizer.group, quantizer.scale[some], quantizer.zero_point[some])
            each = [along_groups(values, own.group, columns)[:, order] for values in (own.scale, own.zero_point)]
            moved = Layer(layer.weight[some][:, order], GroupQuantizer(own.grid, 1, *each), None)
            found[some][:, order] = self._by_columns(moved, upper, _Steps(moved))[0].float()
            found[some] = own.rounded(found[some])
        return Rounded(found, quantizer)

    def _by_columns(self, layer: Layer, upper: Tensor, steps: _Steps) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, [rows, columns], and the scales and zero points that it is rounded with."""
        systems, columns = upper.shape[:2]
        left = layer.weight.to(torch.float64, copy=True).view(systems, -1, columns)
        group = layer.quantizer.group
        size = -(-self.block // group) * group if group < columns else self.block
        for start in range(0, columns, size):
            block = slice(start, min(start + size, columns))
            own, now = upper[:, block, block], left[:, :, block]
            errors = torch.empty_like(now)
            for i in range(now.shape[2]):
                if (start + i) % group == 0:
                    steps.choose((start + i) // group, now[:, :, i : i + group].reshape(-1, min(group, now.shape[2] - i)))
                value = steps.nearest(now[:, :, i], (start + i) // group)
                errors[:, :, i] = (now[:, :, i] - value) / own[:, None, i, i]
                now[:, :, i + 1 :] -= errors[:, :, i, None] * own[:, None, i, i + 1 :]
                now[:, :, i] = value
            left[:, :, block.stop :] -= errors @ upper[:, block, block.stop :]
        return left.view(-1, columns), steps.scale, steps.zero_point


class _Steps:
    """The scales of a layer's groups, chosen anew as they are reached where the layer allows it."""

    def __init__(self, layer: Layer) -> None:
        self._grid, self._regrid = layer.quantizer.grid, layer.regrid
        self.scale, self.zero_point = layer.quantizer.scale, layer.quantizer.zero_point
        if self._regrid is not None:
            self.scale, self.zero_point = self.scale.clone(), self.zero_point.clone()

    def choose(self, group: int, values: Tensor) -> None:
        if self._regrid is not None:
            found = self._regrid(values.float())
            self.scale[:, group], self.zero_point[:, group] = found.scale[:, 0], found.zero_point[:, 0]

    def nearest(self, values: Tensor, group: int) -> Tensor:
        """`[systems, rows]`: values of one column on their grids."""
        scale, zero_point = (of[:, group].double().view(values.shape) for of in (self.scale, self.zero_point))
        return (values / scale).round().clamp(self._grid.low - zero_point, self._grid.high - zero_point) * scale


def _on_grid(layer: Layer, found: Tensor, quantizer: GroupQuantizer) -> Rounded:
    """In float32 exactly what the fake quantizer gives, whatever the last digits in double precision."""
    return Rounded(quantizer.rounded(found.to(layer.weight.dtype)), quantizer)

"""What a scheme is (how an operator computes), an observer (it chooses the quantizer of a tensor from its values), and a rounding (it chooses the
point of that grid that stands for each weight)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args, runtime_checkable

from planish import registry
from planish.errors import UnknownName
from planish.plan import FULL_PRECISION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from planish.quantize.arithmetic import Grid, GroupQuantizer, Quantizer

Equalization = Literal["none", "cross-layer", "smooth"]
"""How channels are scaled against each other before rounding: not at all, by what two operators weigh (Nagel et al., 2019), or by the
size of activations and weights, where it pays (SmoothQuant, Xiao et al., 2023)."""


def check_equalization(name: str) -> None:
    """Refuses a name that is none of `Equalization`.

    Raises:
        UnknownName: it is none.
    """
    if name not in get_args(Equalization):
        raise UnknownName("equalization", name, get_args(Equalization))


@dataclass(frozen=True)
class Scheme:
    """How an operator computes, and what its weight is kept in. Found by name in the registry's kind "scheme".

    Args:
        name: as plans and users write it.
        kinds: the kinds of operators that have a form in it: "conv", "conv_transpose", "linear", "matmul", "attention", "embedding", "lstm", "gru".
        weight_bits: of the grid that weights are rounded to.
        activations: "static" (int8, in ranges from calibration data), "dynamic" (int8, in the range of each call), or "float".
        group: how many weights along the inputs share a scale (fewer where that does not divide them); 0: all of one output.
        activation_bits: of the grid that activations are rounded to, unless they stay in float.
        codebook: "kmeans" or "mixture": weights share 2 ** `weight_bits` values that are fitted to them, instead of even steps.
        needs: the field of a target's `Facts` that must hold; "" for none.
        refusal: why no target that planish knows executes it; "" where some do.
    """

    name: str
    kinds: frozenset[str]
    weight_bits: int
    activations: Literal["static", "dynamic", "float"]
    group: int = 0
    activation_bits: int = 8
    codebook: str = ""
    needs: str = ""
    refusal: str = ""

    @property
    def executed(self) -> str:
        """The scheme whose kernel runs: whatever the grid of a static scheme, runtimes compute in int8; with a codebook, in fp32."""
        return "int8" if self.activations == "static" else FULL_PRECISION if self.codebook else self.name

    @property
    def activation_bytes(self) -> float:
        """Bytes of each value of its output while it is alive."""
        return 1.0 if self.activations == "static" else 4.0

    def largest_weight(self, weight_range: int) -> int:
        """The largest integer of a weight's symmetric grid, where the target allows `weight_range` in the activations' scheme."""
        largest: int = 2 ** (self.weight_bits - 1) - 1
        return largest if self.activations == "float" else min(largest, weight_range)

    @property
    def item_bytes(self) -> float:
        """Bytes of each weight that is not zero in a file that keeps the zeros of a mask as bits; 0 where it cannot."""
        return 1.0 if self.activations == "static" else 4.0 if self.codebook or self is FP32 else 0.0

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight in a file, its share of scales and zero points included; values that are few are kept by number."""
        return (self.weight_bits + (32 + self.weight_bits) / self.group) / 8 if self.group else self.weight_bits / 8


FP32 = Scheme(FULL_PRECISION, frozenset(), 32, "float")
"""What needs no form of its own, and so is not registered."""


def scheme_named(name: str) -> Scheme:
    """A registered scheme, or fp32.

    Raises:
        UnknownName: it is neither.
    """
    return FP32 if name == FP32.name else cast(Scheme, registry.get("scheme", name))


def group_size(wanted: int, columns: int) -> int:
    """The largest power of two from 16 to `wanted` that divides the columns; `wanted` itself where none does (the last group is shorter)."""
    return next((size for size in (wanted >> step for step in range(8)) if size >= 16 and columns % size == 0), wanted)


@runtime_checkable
class Observer(Protocol):
    """Chooses a quantizer for one tensor from the values that it takes on calibration data.

    `quantize` makes one observer per activation and per weight, with the tensor's grid. It calls `update` once per calibration batch
    (once in all for a weight), in the order of the data, under `torch.no_grad`, and then `quantizer` once. Values are finite: tensors with
    NaN or Inf are refused before they get here. An observer keeps a bounded amount of memory however many batches come, does not
    change or keep the values it is given, draws no random numbers, and gives a finite quantizer even for a tensor of zeros.
    Implementations are found by name in the registry's kind "observer".

    Args:
        grid: the integers that the tensor is mapped to.
    """

    def __init__(self, grid: Grid) -> None: ...

    def update(self, values: Tensor) -> None:
        """Watch one batch of values (any shape whose dimension `grid.axis` stays the same)."""
        ...

    def quantizer(self) -> Quantizer:
        """The quantizer for all values watched so far.

        Raises:
            ValueError: nothing was watched.
        """
        ...


@dataclass(frozen=True)
class Layer:
    """A weight that is to be rounded, as the matrix that multiplies columns of inputs.

    Args:
        weight: float32, [rows, columns]; rows are outputs.
        quantizer: its grids: one for each row, or for each group of columns of a row.
        gram: E[x x^T] of the inputs, float64, [systems, columns, columns], not centered; each system is about `rows / systems` rows in turn (a
            grouped convolution has several). None in a block, whose outputs are given instead.
        regrid: the quantizer that the observer chooses for a matrix of one group's width; None where the scales must stay as they are.
    """

    weight: Tensor
    quantizer: GroupQuantizer
    gram: Tensor | None
    regrid: Callable[[Tensor], GroupQuantizer] | None = None

    def errors(self, rounded: Tensor) -> Tensor:
        """E|(w - w') x|^2 of each row w, [rows], float64, for rounded weights of the same shape."""
        assert self.gram is not None
        gone = (self.weight - rounded).double().view(len(self.gram), -1, self.weight.shape[1])
        return ((gone @ self.gram) * gone).sum(2).flatten()


@dataclass(frozen=True)
class Rounded:
    """What stands for a layer's weight.

    Args:
        weight: float32, [rows, columns]; it lies on the quantizer's grids, so that `quantizer.rounded(weight)` is the same.
        quantizer: the layer's own, or with scales that were chosen anew.
    """

    weight: Tensor
    quantizer: GroupQuantizer


class Outputs(Protocol):
    """What a part of the program gives on calibration data, batch by batch; it is differentiable in the weights."""

    batches: int
    """How many there are."""

    def __call__(self, batch: int, weights: Sequence[Tensor] | None) -> Tensor:
        """The output on a batch with these weights, [rows, columns] each, in place of the layers'; None: with all of it in float."""
        ...


@runtime_checkable
class Rounding(Protocol):
    """Chooses which grid point stands for each weight.

    `quantize` makes one, and calls `rounded` for one layer after the other in the order of the program, under `torch.no_grad`, with the
    inputs that the program gives whose earlier weights are rounded already. Where `needs` holds "blocks", it is called once for all
    layers of a residual branch, with what their sum with the skip gives; layers in no block come alone, without outputs. What it is given
    is not changed; random numbers come from the generator alone. Any finite weights and inputs do: an input that is always zero,
    fewer samples than inputs, or one. Implementations are found by name in the registry's kind "rounding" and keep
    `planish.testing.rounding`.
    """

    needs: frozenset[str]
    """Holds "moments" where it looks at the inputs, and "blocks" besides where it looks at the outputs of blocks."""

    def rounded(self, layers: Sequence[Layer], outputs: Outputs | None, generator: torch.Generator) -> list[Rounded]:
        """The layers' weights on their grids, in the order of the layers."""
        ...

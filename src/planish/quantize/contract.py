"""What a scheme is (how an operator computes), and what an observer is (it chooses the quantizer of a tensor from its values)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

from planish.errors import UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from planish.quantize.arithmetic import Grid, Quantizer

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
        kinds: the kinds of operators that have a form in it: "conv", "linear", "matmul", "embedding".
        weight_bits: of the grid that weights are rounded to.
        activations: "static" (int8, in ranges from calibration data), "dynamic" (int8, in the range of each call), or "float".
        group: how many weights along the inputs share a scale (fewer where that does not divide them); 0: all of one output.
        activation_bits: of the grid that activations are rounded to, unless they stay in float.
        refusal: why no target that planish knows executes it; "" where some do.
    """

    name: str
    kinds: frozenset[str]
    weight_bits: int
    activations: Literal["static", "dynamic", "float"]
    group: int = 0
    activation_bits: int = 8
    refusal: str = ""

    @property
    def executed(self) -> str:
        """The scheme whose kernel runs: whatever the grid of a static scheme, runtimes compute in int8."""
        return "int8" if self.activations == "static" else self.name

    @property
    def activation_bytes(self) -> float:
        """Bytes of each value of its output while it is alive."""
        return 1.0 if self.activations == "static" else 4.0

    def largest_weight(self, weight_range: int) -> int:
        """The largest integer of a weight's symmetric grid, where the target allows `weight_range` in the activations' scheme."""
        largest: int = 2 ** (self.weight_bits - 1) - 1
        return largest if self.activations == "float" else min(largest, weight_range)

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight in a file, its share of scales and zero points included."""
        if self.activations != "float":
            return 1.0  # runtimes read these as int8, whatever the grid
        return (self.weight_bits + (32 + self.weight_bits) / self.group) / 8 if self.group else self.weight_bits / 8


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

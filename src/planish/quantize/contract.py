"""What an observer is: it watches the values of one tensor and then chooses the quantizer that the tensor gets."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from planish.quantize.arithmetic import Grid, Quantizer


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

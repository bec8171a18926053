"""The inputs and outputs of a model: names, types, shapes, and the structure its caller sees. Needs numpy, never torch."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from planish.errors import DataError

Structure = Literal["tensor", "tuple", "dict"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its name, numpy dtype name, and shape, where a string ("batch", "sequence") is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes in and comes out, flat and in order, and how the caller sees it.

    Args:
        inputs: the flat inputs in the order of the runtime model.
        outputs: the flat outputs likewise.
        takes: the structure of the caller's inputs; "tensor" is one input given bare.
        gives: the structure of what the caller gets back.
        state: input name -> output name, for inputs that the caller feeds from the step before.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    takes: Structure
    gives: Structure
    state: dict[str, str] = {}

    @property
    def is_sized(self) -> bool:
        """Whether no axis of an input but its first may vary."""
        return not any(isinstance(size, str) for spec in self.inputs for size in spec.shape[1:])

    def flatten(self, inputs: Any) -> list[Any]:
        """The flat inputs from a tensor, a tuple or list, or a dict by name.

        Raises:
            DataError: a missing or unknown name, or another number of tensors than the model takes.
        """
        wanted = [spec.name for spec in self.inputs]
        if isinstance(inputs, dict) or (hasattr(inputs, "keys") and hasattr(inputs, "__getitem__")):
            missing = [name for name in wanted if name not in inputs]
            unknown = [str(name) for name in inputs if name not in wanted]
            if missing or unknown:
                raise DataError(f"inputs: the model takes {wanted}; missing {missing}, unknown {unknown}")
            return [inputs[name] for name in wanted]
        flat = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(flat) != len(wanted):
            raise DataError(f"inputs: the model takes {len(wanted)} tensors ({', '.join(wanted)}); got {len(flat)}")
        return flat

    def unflatten(self, outputs: list[Any]) -> Any:
        """The outputs in the structure that the original model gives."""
        if self.gives == "tensor":
            return outputs[0]
        if self.gives == "tuple":
            return tuple(outputs)
        return {spec.name: value for spec, value in zip(self.outputs, outputs, strict=True)}

    def check(self, flat: list[np.ndarray[Any, Any]], where: str = "inputs") -> None:
        """Refuse arrays whose dtype, rank or fixed sizes are not the model's.

        Raises:
            DataError: the first mismatch, by name.
        """
        axes: dict[str, int] = {}
        for spec, array in zip(self.inputs, flat, strict=True):
            if array.dtype != np.dtype(spec.dtype):
                raise DataError(
                    f"{where}: {spec.name!r} must be {spec.dtype}; got {array.dtype}; convert it, as with .astype('{spec.dtype}')"
                )
            if array.size == 0:
                raise DataError(f"{where}: {spec.name!r} is empty, of shape {list(array.shape)}; give at least one sample")
            if array.ndim != len(spec.shape):
                raise DataError(f"{where}: {spec.name!r} must have shape {list(spec.shape)}; got {list(array.shape)}")
            for size, wanted in zip(array.shape, spec.shape, strict=True):
                if isinstance(wanted, str):
                    wanted = axes.setdefault(wanted, size)
                if size != wanted:
                    raise DataError(f"{where}: {spec.name!r} must have shape {list(spec.shape)}; got {list(array.shape)}")

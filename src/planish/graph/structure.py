"""From the structure that a model takes and gives to flat tensors with names, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planish.errors import DataError, UsageError
from planish.signature import Structure


def flat_inputs(model: nn.Module, example: Any) -> tuple[Structure, dict[str, Tensor]]:
    """How the caller gives the inputs, and the inputs by name (positional ones are named after the parameters of forward)."""
    takes: Structure
    if isinstance(example, Mapping):
        takes, named = "dict", {str(name): value for name, value in example.items()}
    elif isinstance(example, (Tensor, tuple, list)):
        values = [example] if isinstance(example, Tensor) else list(example)
        takes = "tensor" if len(values) == 1 else "tuple"
        named = dict(zip(_positional_names(model, len(values)), values, strict=True))
    else:
        raise UsageError(f"capture: example_inputs must be a tensor, a tuple or a dict of tensors; got {type(example).__name__}")
    if not named:
        raise UsageError("capture: example_inputs must hold at least one tensor; got none")
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"capture: example_inputs must be tensors; {name!r} is {type(value).__name__}; "
                "bind what is not a tensor in the model (functools.partial or a wrapping module)"
            )
    return takes, {name: value.detach().cpu() for name, value in named.items()}


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """One name per positional input: the parameter of forward, else "input_0", ..."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count] + [f"input_{index}" for index in range(len(names), count)]


def check_batch(inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs whose axis 0 is not one shared batch of at least one sample, with a DataError."""
    sizes = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in inputs.items()}
    if None in sizes.values() or len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise DataError(
            f"capture: axis 0 of every example input must be the batch, the same and at least 1; got {sizes}; "
            "bind inputs without a batch in the model"
        )


class FlatCall:
    """The model as a function of flat tensors; remembers names and structure of what it gave at the first call."""

    def __init__(self, model: nn.Module, names: list[str], takes: Structure) -> None:
        self.forward = model.forward
        self.names = names
        self.takes = takes
        self.outputs: list[str] = []
        self.gives: Structure = "tensor"
        self.notes: list[str] = []

    def __call__(self, *flat: Tensor) -> tuple[Tensor, ...]:
        result = self.forward(**dict(zip(self.names, flat, strict=True))) if self.takes == "dict" else self.forward(*flat)
        leaves = list(_leaves(result, ""))
        tensors = [(name, value) for name, value in leaves if isinstance(value, Tensor)]
        if not self.outputs:
            self.gives = (
                "tensor"
                if isinstance(result, Tensor)
                else "tuple"
                if isinstance(result, (tuple, list)) and not hasattr(result, "_fields")
                else "dict"
            )
            names = [name for name, _ in tensors]
            if self.gives != "dict":
                names = ["output"] if self.gives == "tensor" else [f"output_{name.replace('.', '_')}" for name in names]
            self.outputs = names
            dropped = sorted(name for name, value in leaves if not isinstance(value, Tensor) and value is not None)
            if dropped:
                self.notes.append(f"outputs that are no tensors are left out: {', '.join(dropped)}")
        return tuple(value for _, value in tensors)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested outputs with their dotted names, in the order of the structure."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif not isinstance(value, Tensor) and type(value) in pytree.SUPPORTED_NODES:
        items = enumerate(pytree.tree_leaves(value))
    else:
        yield path, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))

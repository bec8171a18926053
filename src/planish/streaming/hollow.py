"""Models without weights: every parameter has its shape, and one number for memory."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planish.errors import DataError, UsageError
from planish.streaming.weights import Weights


def hollow(shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of a shape that share one number."""
    return torch.zeros((), dtype=dtype).expand(shape)


def built(model: nn.Module | Callable[[], nn.Module], weights: Weights) -> nn.Module:
    """The model with hollow parameters, in evaluation mode; buffers are read, or as they were made if the model does not save them.

    Args:
        model: a function that builds it (each parameter is dropped as soon as it is made), or a module on the meta device.
        weights: must hold every parameter, in its shape; of parameters that are one tensor, one name.

    Raises:
        UsageError: it builds no module; a parameter that the weights lack or have in another shape; a buffer that is saved and that they
            lack, or that has no values.
    """
    if not isinstance(model, nn.Module):
        with _without_weights():
            model = model()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: must be a torch.nn.Module or a function that builds one; got {type(model).__name__}")
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                kept = shared.setdefault(id(parameter), nn.Parameter(hollow(parameter.shape), requires_grad=False))
                module._parameters[name] = kept
    for prefix, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                path = f"{prefix}.{name}".lstrip(".")
                module._buffers[name] = _buffer(path, buffer, name not in module._non_persistent_buffers_set, weights)
    _check_shared(model, weights)
    return model.eval()


def _buffer(path: str, buffer: Tensor, is_saved: bool, weights: Weights) -> Tensor:
    """The values of a buffer: those that are stored, else those that it was made with."""
    if path in weights:
        weights.check_shape(path, buffer.shape)
        return weights.read(path).to(buffer.dtype)
    if is_saved and buffer.is_floating_point():
        raise UsageError(f"weights: {weights.path} must hold buffer {path!r}, which the model saves with its parameters")
    if buffer.is_meta:
        raise UsageError(
            f"model: buffer {path!r} must have values; it lies on the meta device and the weights lack it; give a function "
            "that builds the model, and make the buffer with its values (torch.zeros, not torch.empty)"
        )
    return buffer


def _check_shared(model: nn.Module, weights: Weights) -> None:
    """Refuse files that hold different values for names that are one tensor in the model."""
    stored = stored_names(model, weights)
    for name, stands_for in stored.items():
        if name != stands_for and name in weights and not torch.equal(weights.read(name), weights.read(stands_for)):
            raise DataError(f"weights: {name!r} and {stands_for!r} are one tensor in the model; {weights.path} has two that differ")


def stored_names(model: nn.Module, weights: Weights) -> Mapping[str, str]:
    """Every name of every parameter -> the name under which its values are stored.

    Raises:
        UsageError: there is none, or its shape differs.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same = names[id(parameter)]
        stored = next((one for one in same if one in weights), None)
        if stored is None:
            raise UsageError(f"weights: {weights.path} must hold parameter {name!r}; {_nearest(name, weights)}")
        weights.check_shape(stored, parameter.shape)
        found[name] = stored
    return found


def _nearest(name: str, weights: Weights) -> str:
    """What is stored that comes nearest to a name, and what to do."""
    if name in weights.unread:
        return f"it holds it as {weights.unread[name][:20]}, which is not read; convert it to F32, F16 or BF16"
    for stored in weights:
        if stored.endswith(f".{name}"):
            return (
                f"it holds {stored!r}: hold the net in a module, under the name {stored.removesuffix(name)[:-1]!r}, or rename the tensors"
            )
        if name.endswith(f".{stored}"):
            return f"it holds {stored!r}: give the module {name.removesuffix(stored)[:-1]!r} of that model alone, or rename the tensors"
    near = difflib.get_close_matches(name, list(weights), n=1)
    some = repr(near[0]) if near else ", ".join(list(weights)[:3]) + ", ..."
    return f"it holds {some}; names must be those of the model"


class _EmptyOnMeta(TorchFunctionMode):
    """What `torch.empty` makes lies on the meta device: parameters, before their module fills them. Buffers are made with their values."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        return func(*args, **({**given, "device": "meta"} if func is torch.empty else given))


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Within, a parameter goes to the meta device as soon as a module takes it, if it was not made there; buffers stay real."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is shared stays one
            param = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

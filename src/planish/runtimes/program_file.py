"""A captured program as one safetensors file: tensors as they are, the operators as JSON in its metadata. Loading runs no code.

The file format: metadata "program" is a JSON object with `nodes` (in order; each [op, name, target, args, kwargs]) and `alias`
(tensor name -> the name it shares its storage with). Loading looks targets up in two closed lists: operators of torch's own
namespaces, and arithmetic on sizes. Nothing else can be named, nothing is unpickled.
"""

from __future__ import annotations

import importlib
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from planish.errors import RuntimeFailed

_NAMESPACES = ("aten", "quantized_decomposed")
_ON_SIZES: dict[str, Callable[..., Any]] = {
    **{f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)},
    **{f"operator.{f.__name__}": f for f in (operator.mod, operator.neg, operator.truediv, operator.pow)},
    **{f"operator.{f.__name__}": f for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)},
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_ite": torch.sym_ite,
    "torch.sym_not": torch.sym_not,
}
_NAMES = {function: name for name, function in _ON_SIZES.items()}
_ATOMS = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def save_program(module: torch.fx.GraphModule, path: Path) -> None:
    """Write a program and its tensors.

    Raises:
        RuntimeFailed: "unsupported", for an operator or constant that the format has no word for.
    """
    nodes: list[list[Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    alias: dict[str, str] = {}
    owner: dict[tuple[Any, ...], str] = {}
    for node in module.graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = _name_of(target)
        elif node.op == "get_attr":
            value = operator.attrgetter(str(target))(module)
            if not isinstance(value, torch.Tensor):
                raise RuntimeFailed("unsupported", f"torch: {node.name} is a {type(value).__name__}, not a tensor")
            tensor = value.detach()
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (str(target),)
            first = owner.setdefault(key, str(target))
            if first == target:
                tensors[str(target)] = tensor.contiguous().clone()
            else:
                alias[str(target)] = first
        elif node.op not in ("placeholder", "output"):
            raise RuntimeFailed("unsupported", f"torch: the program calls {node.op} {target}, which a program file cannot hold")
        nodes.append([node.op, node.name, str(target), [_encode(a) for a in node.args], {k: _encode(v) for k, v in node.kwargs.items()}])
    save_file(tensors, str(path), {"program": json.dumps({"nodes": nodes, "alias": alias})})


def load_program(path: Path) -> torch.fx.GraphModule:
    """The module that `save_program` wrote: takes the flat inputs, gives the tuple of outputs.

    Raises:
        RuntimeFailed: "unsupported": no program file, or it names something outside the closed lists.
    """
    try:
        with safe_open(str(path), "pt") as file:
            program = json.loads((file.metadata() or {})["program"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (SafetensorError, KeyError, ValueError, OSError) as err:
        raise RuntimeFailed("unsupported", f"torch refuses {path.name}: it is no program file ({err})") from err
    tensors |= {name: tensors[first] for name, first in program["alias"].items()}
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        place.register_buffer(leaf, tensor)
    graph = torch.fx.Graph()
    known: dict[str, torch.fx.Node] = {}
    for op, name, target, args, kwargs in program["nodes"]:
        if op not in ("placeholder", "get_attr", "call_function", "output"):
            raise RuntimeFailed("unsupported", f"torch refuses {path.name}: unknown kind of node {op!r}")
        found = _find(target) if op == "call_function" else target
        given = tuple(_decode(a, known) for a in args)
        known[name] = graph.create_node(op, found, given, {k: _decode(v, known) for k, v in kwargs.items()}, name)
    graph.lint()
    return torch.fx.GraphModule(root, graph)


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise RuntimeFailed("unsupported", f"torch: a program file has no word for the operator {target}")


def _find(name: str) -> Any:
    if name in _ON_SIZES:
        return _ON_SIZES[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace == "quantized_decomposed":
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    if namespace in _NAMESPACES and packet.isidentifier() and overload.isidentifier():
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise RuntimeFailed("unsupported", f"torch: unknown operator {name[:80]!r} in a program file")


def _encode(value: Any) -> Any:
    """JSON for an argument: atoms as they are, lists as lists, all else as an object with one key that names its type."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if isinstance(value, _ATOMS):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    raise RuntimeFailed("unsupported", f"torch: a program file has no word for the constant {value!r:.80}")


def _decode(value: Any, known: dict[str, torch.fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return known[inner]
    if kind == "float":
        return float(inner)
    if kind == "slice":
        return slice(*(_decode(item, known) for item in inner))
    if kind == "device":
        return torch.device(inner)
    atom = getattr(torch, inner, None)
    if isinstance(atom, _ATOMS):
        return atom
    raise RuntimeFailed("unsupported", f"torch: unknown constant {str(value)[:80]} in a program file")

"""What a program computes when elements are absent, at its original shapes: the oracle that surgery is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.graph.edit import Survivors
from planish.graph.facts import arguments, attribute, call, rule_name
from planish.graph.ids import Val
from planish.graph.program import Program

_STATISTICS = frozenset({"mean", "var", "std", "amax", "amin", "max", "min", "logsumexp", "softmax", "_softmax", "log_softmax", "softmin"})
_ROUTERS = frozenset({"topk", "argmax"})


class _Reference:
    def __init__(self, program: Program, stay: Survivors) -> None:
        self.program, self.stay = program, stay

    def _mask(self, val: Val, dim: int, size: int) -> Tensor:
        """Which indices are there, in a run that may have another batch: a batch inside a dimension repeats, outside or inside."""
        here = torch.from_numpy(self.stay.mask(val, dim))
        if len(here) == size:
            return here
        outer = here.view(2, -1)
        if bool((outer[0] == outer[1]).all()):
            return outer[0].repeat(2 * size // len(here))
        return here.view(-1, 2)[:, 0].repeat_interleave(2 * size // len(here))

    def absent(self, tensor: Any, val: Any) -> Any:
        """Zeros where an element is absent."""
        if isinstance(tensor, (tuple, list)) and isinstance(val, list):
            return [self.absent(t, v) for t, v in zip(tensor, val, strict=True)]
        if isinstance(tensor, Tensor) and isinstance(val, Val):
            for d in val.dims:
                if self.stay.changed(val, d):
                    view = [1] * tensor.dim()
                    view[d] = -1
                    tensor = torch.where(self._mask(val, d, tensor.shape[d]).view(view), tensor, torch.zeros((), dtype=tensor.dtype))
        return tensor

    def statistic(self, node: Node, x: Tensor, val: Val, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A reduction or norm over what is there: on the survivors alone, put back at their places."""
        there = {d: self._mask(val, d, x.shape[d]).nonzero()[:, 0] for d in val.dims}
        for d, index in there.items():
            x = x.index_select(d, index)
        if rule_name(node.target) in ("layer_norm", "rms_norm"):
            first = val.rank - len(args[1])
            affine = []
            for parameter in args[2:4]:
                for d in range(first, val.rank):
                    if isinstance(parameter, Tensor) and d in there:
                        parameter = parameter.index_select(d - first, there[d])
                affine.append(parameter)
            args = (args[0], list(x.shape[first:]), *affine, *args[4:])
        small = call(node, (x, *args[1:]), kwargs)
        out = self.program.vals[node.name]
        assert isinstance(small, Tensor) and isinstance(out, Val)
        full = torch.zeros(*(k if not out.labels(d) else self._full(out, d, k) for d, k in enumerate(small.shape)), dtype=small.dtype)
        places = [
            self._mask(out, d, full.shape[d]).nonzero()[:, 0] if out.labels(d) else torch.arange(full.shape[d]) for d in range(full.dim())
        ]
        full[torch.meshgrid(*places, indexing="ij")] = small
        return full

    def routed(self, node: Node, x: Tensor, val: Val, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a router picks from what is there, as positions in the whole."""
        given = arguments(node)
        dim = int(given["dim"]) % val.rank
        there = self._mask(val, dim, x.shape[dim]).nonzero()[:, 0]
        found = call(node, (x.index_select(dim, there), *args[1:]), kwargs)
        return [found[0], there[found[1]]] if isinstance(found, (tuple, list)) else there[found]

    def _full(self, val: Val, dim: int, small: int) -> int:
        return small * val.shape[dim] // self.stay.count(val, dim)


def run_masked(program: Program, stay: Survivors, flat_inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of the original program when only `stay` is there: absent elements are zero in every value, statistics skip them."""
    reference = _Reference(program, stay)
    env: dict[Node, Any] = {}
    feed = iter(flat_inputs)
    with torch.no_grad():
        for node in program.module.graph.nodes:
            if node.op == "placeholder":
                env[node] = reference.absent(next(feed).clone(), program.vals[node.name])
                continue
            if node.op == "get_attr":
                env[node] = attribute(program.module, str(node.target))
                continue
            if node.op == "output":
                return tuple(map_arg(node.args[0], env.__getitem__))
            args: Any = map_arg(node.args, env.__getitem__)
            kwargs: Any = map_arg(node.kwargs, env.__getitem__)
            name = rule_name(node.target)
            if name in ("lstm", "gru"):
                # The recurrence is inside: an absent cell is one whose weights are all zero.
                weights = [reference.absent(t, program.operand(p, node)) for p, t in zip(arguments(node)["params"], args[2], strict=True)]
                args = (args[0], args[1], weights, *args[3:])
            first = program.operand(node.args[0], node) if node.args and isinstance(node.args[0], Node) else None
            shrinks = first is not None and any(stay.changed(first, d) for d in first.dims)
            if first is not None and name in _ROUTERS and arguments(node)["dim"] is not None and shrinks:
                env[node] = reference.routed(node, args[0], first, args, kwargs)
            elif (
                first is not None
                and shrinks
                and (name in ("layer_norm", "rms_norm") or (name in _STATISTICS and "other" not in arguments(node)))
            ):
                env[node] = reference.statistic(node, args[0], first, args, kwargs)
            else:
                env[node] = reference.absent(call(node, args, kwargs), program.vals.get(node.name))
    raise AssertionError("a program ends with its output")

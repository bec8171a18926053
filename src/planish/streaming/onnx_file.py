"""The ONNX model around tensors that lie in a file of their own: made from a hollow graph, so that none of them is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import nn
from torch.fx import GraphModule, Node

from planish.graph.graph import Graph
from planish.graph.parts import known_parts
from planish.graph.qdq import held
from planish.runtimes.onnx_schemes import look_up_rows, multiply_by_groups
from planish.runtimes.to_onnx import finish, traced
from planish.streaming.hollow import hollow
from planish.streaming.pieces import Pieces


@dataclass(frozen=True)
class Grouped:
    """An operator whose weight is kept by groups.

    Args:
        prefix: of the names of its tensors among the pieces.
        outputs, inputs: sizes of its matrix.
        bits, group: of the integers, and how many share a scale.
    """

    prefix: str
    outputs: int
    inputs: int
    bits: int
    group: int


def write_onnx(
    graph: Graph, grouped: Mapping[Node, Grouped], rows: Mapping[Node, str], stored: Mapping[str, str], pieces: Pieces, path: Path
) -> None:
    """Writes `path`, whose tensors lie in the file of `pieces` beside it.

    Args:
        graph: hollow; it is used up.
        grouped: operators of its program that multiply by groups.
        rows: embeddings whose rows are int8 -> the prefix of the names of their tensors among the pieces.
        stored: parameter -> its name among the pieces, if it is there.
        pieces: hold what the operators and the other parameters need.
    """
    module = graph.module
    names = {name: stands_for for name, stands_for in stored.items() if stands_for in pieces}
    for name, stands_for in names.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(hollow(pieces.shape(stands_for)), requires_grad=False))

    def read(node: Node, prefix: str, kinds: Sequence[str]) -> list[Node]:
        found = []
        with module.graph.inserting_before(node):
            for what in kinds:
                piece = f"{prefix}.{what}"
                found.append(held(module, f"{node.name}_{what}", hollow(pieces.shape(piece), pieces.dtype(piece))))
                names[str(found[-1].target)] = piece
        return found

    for node, how in grouped.items():
        tensors = read(node, how.prefix, ("packed", "scales", "zeros"))
        multiply_by_groups(node, known_parts(node), tensors, how.inputs, how.outputs, how.bits, how.group)
    for node, prefix in rows.items():
        look_up_rows(node, read(node, prefix, ("rows", "row_scales")))
    module.graph.eliminate_dead_code()
    graph.module = GraphModule(module, module.graph)
    model = traced(graph, optimize=False)
    for name, value in model.graph.initializers.items():
        if name in names:
            value.const_value = pieces.external(names[name])
        else:
            assert name not in stored, f"{name} was never written"
    finish(model, graph.signature)
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))

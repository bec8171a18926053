"""The contract that every net is held to: surgery equals masking, an exported net equals its module. Tests assert it, a benchmark prints it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from planish.graph.graph import Analysis, Graph
from planish.graph.surgery import masked_reference, prune
from planish.runtimes.to_onnx import to_onnx

BATCHES = (1, 3, 17)
SURGERY, EXPORT = 2e-5, 1e-4
"""Relative errors that rounding explains."""


def at_random(analysis: Analysis, share: float = 0.4, seed: int = 0) -> dict[str, list[int]]:
    """Units to remove: that share of every group, at least one, never all."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.permutation(group.units)[: min(max(1, round(share * group.units)), group.units - 1)].tolist()
        for name, group in analysis.groups.items()
    }


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value."""
    assert [tuple(value.shape) for value in found] == [tuple(value.shape) for value in expected]
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def surgery(graph: Graph, analysis: Analysis, removed: Mapping[str, Sequence[int]], flat: Sequence[Tensor]) -> tuple[float, float]:
    """How far the pruned net is from the original with the same elements absent, and how far that is from the original."""
    reference = masked_reference(graph, analysis, removed, flat)
    pruned = prune(graph, analysis, removed).graph
    return difference(pruned.module(*flat), reference), difference(reference, graph.module(*flat))


def batches(graph: Graph) -> tuple[int, ...]:
    """At which batches a net must be right: at 1, 3 and 17, or at the only one that it takes."""
    first = graph.signature.inputs[0].shape[0]
    return (first,) if isinstance(first, int) else BATCHES


@torch.no_grad()
def exported(graph: Graph, inputs: Callable[[int], Any], path: Path) -> dict[int, float]:
    """How far ONNX Runtime, given the file written to `path`, is from the module; by batch."""
    to_onnx(graph, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    present = {one.name for one in session.get_inputs()}
    names = [spec.name for spec in graph.signature.inputs]
    found = {}
    for batch in batches(graph):
        flat = graph.signature.flatten(inputs(batch))
        values = session.run(None, {n: t.numpy() for n, t in zip(names, flat, strict=True) if n in present})
        found[batch] = difference([torch.from_numpy(value) for value in values], graph.module(*flat))
    return found


@torch.no_grad()
def noise(graph: Graph, inputs: Any) -> float:
    """How far a relative change of the inputs by 1e-6, some sixteen roundings of a float, moves the module's own outputs."""
    flat = graph.signature.flatten(inputs)
    moved = [value * (1 + 1e-6) if value.is_floating_point() else value for value in flat]
    return difference(graph.module(*moved), graph.module(*flat))

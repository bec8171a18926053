"""What the tests of pruning share: captured nets with their analysis and some calibration data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.prune.contract import Material


def captured(model: nn.Module, example: Any) -> tuple[Graph, Analysis]:
    """The graph of a model and its analysis."""
    graph = capture(model, example)
    return graph, analyse(graph)


def calibration(graph: Graph, samples: int, seed: int = 5) -> Split:
    """Random inputs of the graph's kind."""
    flat = nets.resized(tuple(graph.example), samples, seed=seed)
    return Split([np.ascontiguousarray(value.numpy()) for value in flat], None, samples)


def material(graph: Graph, samples: int, seed: int = 5) -> Material:
    """Random inputs of the graph's kind with random labels, and the loss of labels where the first output is one of classes."""
    split = calibration(graph, samples, seed)
    out = outputs(graph, split)
    targets = np.random.default_rng(seed).integers(0, out.shape[1], samples)
    return Material(split, Split(split.inputs, targets, samples), lambda flat, wanted: F.cross_entropy(flat[0], wanted))


def outputs(graph: Graph, split: Split) -> Tensor:
    """The first flat output for all samples of a split."""
    with torch.no_grad():
        value = graph.module(*(torch.from_numpy(array) for array in split.inputs))[0]
    assert isinstance(value, Tensor)
    return value


def relative_error(new: Tensor, old: Tensor) -> float:
    """The root of the relative squared error."""
    return float((new - old).norm() / old.norm())

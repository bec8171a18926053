"""Embedding tables: the vocabulary is fixed, the embedding dimension is issued."""

from __future__ import annotations

from planish.graph.facts import Shape
from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("embedding")
def embedding(step: Step) -> Result | None:
    """Rows picked by an index."""
    return _picked(step, step.shape)


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(step: Step) -> Result | None:
    """Rows picked by an index, and their sum, mean or maximum for each bag; what else comes out counts and carries no ids."""
    first, *others = step.shapes
    assert first is not None
    return [_picked(step, first), *(None if shape is None else Val(shape) for shape in others)]


def _picked(step: Step, shape: Shape) -> Val:
    """Rows of the table along the last dimension of an output of that shape."""
    weight = step.tensor("weight")
    for val in step.operands():
        if val is not weight:
            step.ids.fix_all(val, f"it is an index of {step.why}")
    step.ids.fix_all(weight, "it is the vocabulary", [0])
    step.ids.role(weight, 1, "out")
    return Val(shape, {len(shape) - 1: weight.ids[1]} if 1 in weight.ids else {})

"""Embedding tables: the vocabulary is fixed, the embedding dimension is issued."""

from __future__ import annotations

from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("embedding")
def embedding(step: Step) -> Result | None:
    """Rows picked by an index."""
    weight = step.tensor("weight")
    step.ids.fix_all(step.val("indices"), f"it is an index of {step.why}")
    step.ids.fix_all(weight, "it is the vocabulary", [0])
    step.ids.role(weight, 1, "out")
    return Val(step.shape, {len(step.shape) - 1: weight.ids[1]} if 1 in weight.ids else {})

"""Scaled dot-product attention: three contractions in one; heads are units, the sequence is fixed."""

from __future__ import annotations

import math

from planish.graph.edit import Edit, edit
from planish.graph.program import Result, Step, rule


@rule("scaled_dot_product_attention")
def attention(step: Step) -> Result | None:
    """`softmax(q k^T + mask) v`: query and key share the head size, value gives the output's; heads are tied in all."""
    query, key, value, mask = step.tensor("query"), step.tensor("key"), step.tensor("value"), step.val("attn_mask")
    rank = query.rank
    if rank < 3 or key.rank != rank or value.rank != rank:
        return None
    step.ids.contract(query, rank - 1, key, rank - 1, step.why)
    for val in (query, key, value):
        step.ids.fix_all(val, f"it is the sequence of {step.why}", [rank - 2])
    batch = [val.leading(rank - 2) for val in (query, key, value)]
    heads = rank - 3
    for val in batch[1:]:
        if step.value("enable_gqa") and 1 < val.shape[heads] != query.shape[heads]:  # a single head is broadcast
            repeats = query.shape[heads] // val.shape[heads]
            if heads in val.ids:
                val.ids[heads] = val.ids[heads].repeat_interleave(repeats)
            val.shape = batch[0].shape
    if mask is not None:
        step.ids.fix_all(mask, f"it is the sequence of {step.why}", range(mask.rank - 2, mask.rank))
        batch.append(mask.leading(mask.rank - 2))
    out = step.ids.join(step.shape[:-2], batch, step.why)
    out.shape = step.shape
    if rank - 1 in value.ids:
        step.ids.put(out, rank - 1, value.ids[rank - 1], rank - 1 in value.weak, step.why)
    return out


@edit("scaled_dot_product_attention")
def edit_attention(edit: Edit) -> None:
    """The default scale depends on the head size: pin what it was."""
    query = edit.val("query")
    if edit.survivors.changed(query, query.rank - 1) and edit.arguments.get("scale") is None:
        edit.set("scale", 1.0 / math.sqrt(query.shape[-1]))

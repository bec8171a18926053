"""Tensors made from nothing: literal sizes can be resized, so their ids are fresh and weak."""

from __future__ import annotations

from planish.graph.edit import Edit, edit
from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def created(step: Step) -> Result | None:
    """Fresh weak ids wherever the size is a literal above 1."""
    out = Val(step.shape)
    for d, size in enumerate(step.arguments["size"]):
        if isinstance(size, int) and size > 1:
            step.ids.put(out, d, step.ids.fresh(size), True, step.why)
    return out


@edit("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def edit_created(edit: Edit) -> None:
    """The size."""
    edit.set("size", edit.resized(list(edit.current["size"]), list(range(edit.out.rank))))


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def like(step: Step) -> Result | None:
    """As large as another tensor, whatever becomes of it."""
    x = step.operands()[0]
    return Val(step.shape, dict(x.ids), set(x.weak))


@rule("arange", "scalar_tensor", "eye", "linspace")
def counted(step: Step) -> Result | None:
    """Values that depend on their position: fixed."""
    return step.plain()

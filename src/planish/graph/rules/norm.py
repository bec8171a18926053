"""Normalisations tie their affine parameters; those that run over the pruned dimension make its group inexact."""

from __future__ import annotations

from planish.graph.edit import Edit, edit
from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("batch_norm", "instance_norm")
def batch_norm(step: Step) -> Result | None:
    """Statistics per channel, which is dimension 1."""
    x = step.tensor("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        val = step.val(name)
        if val is not None:
            step.ids.contract(x, 1, val, 0, step.why)
            step.ids.role(val, 0, "affine")
    return Val(step.shape, dict(x.ids), set(x.weak))


@rule("layer_norm", "rms_norm")
def layer_norm(step: Step) -> Result | None:
    """Statistics over the last dimensions: removal is allowed, and changes them."""
    x = step.tensor("input")
    dims = range(x.rank - len(step.value("normalized_shape")), x.rank)
    for name in ("weight", "bias"):
        val = step.val(name)
        if val is not None:
            for j, d in enumerate(dims):
                step.ids.contract(x, d, val, j, step.why)
                step.ids.role(val, j, "affine")
    for d in dims:
        if d in x.ids:
            step.ids.mark_inexact(x.ids[d])
    return Val(step.shape, dict(x.ids), set(x.weak))


@edit("layer_norm", "rms_norm")
def edit_layer_norm(edit: Edit) -> None:
    """The normalised shape."""
    x, shape = edit.val("input"), list(edit.value("normalized_shape"))
    edit.set("normalized_shape", [edit.survivors.count(x, x.rank - len(shape) + j) for j in range(len(shape))])


@rule("group_norm")
def group_norm(step: Step) -> Result | None:
    """Statistics over groups of channels: whole groups go, which keeps it exact."""
    x = step.tensor("input")
    if 1 in x.ids:
        grouped = x.ids[1].view(int(step.value("num_groups")), -1)
        step.ids.tie(grouped, grouped[:, :1], step.why)
    for name in ("weight", "bias"):
        val = step.val(name)
        if val is not None:
            step.ids.contract(x, 1, val, 0, step.why)
            step.ids.role(val, 0, "affine")
    return Val(step.shape, dict(x.ids), set(x.weak))


@edit("group_norm")
def edit_group_norm(edit: Edit) -> None:
    """The number of groups."""
    x, groups = edit.val("input"), int(edit.value("num_groups"))
    if edit.survivors.changed(x, 1):
        edit.set("num_groups", int(edit.survivors.mask(x, 1).reshape(groups, -1)[:, 0].sum()))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "softmin")
def softmax(step: Step) -> Result | None:
    """A distribution over what is there: removal is allowed, and changes it."""
    x = step.operands()[0]
    dim = int(step.value("dim")) % x.rank
    if dim in x.ids:
        step.ids.mark_inexact(x.ids[dim])
    return Val(step.shape, dict(x.ids), set(x.weak))


@rule("cumsum", "cumprod", "logcumsumexp")
def along(step: Step) -> Result | None:
    """Operators along one dimension, where no index can be left out."""
    x = step.operands()[0]
    dim = int(step.value("dim")) % x.rank
    step.ids.fix_all(x, f"{step.why} runs over it", [dim])
    return x.only([d for d in x.ids if d != dim])

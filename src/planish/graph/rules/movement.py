"""Operators that only move elements: executed on the ids as they are; surgery recomputes the literal sizes that they carry."""

from __future__ import annotations

import numpy as np
import torch

from planish.graph.edit import Edit, edit
from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule

aten = torch.ops.aten


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "narrow",
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "unsafe_split",
    "tensor_split",
    "unbind",
    "repeat",
    "repeat_interleave",
    "tile",
    "flip",
    "roll",
    "flatten",
    "unflatten",
    "pixel_shuffle",
    "pixel_unshuffle",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "unfold",
    "diagonal",
)
def movement(step: Step) -> Result | None:
    """Run the operator on the ids. Other tensor arguments (a tensor of repeats) are not covered."""
    if len(step.operands()) != 1:
        return None
    val = step.operands()[0]
    if step.name == "squeeze" and step.arguments.get("dim") is not None:
        dims = step.value("dim")
        for d in [dims] if isinstance(dims, int) else dims:
            # Nothing to squeeze now, but a width of 1 would be squeezed after surgery.
            step.ids.fix_all(val, f"it must not become 1 before {step.why}", [d % val.rank] if val.shape[d % val.rank] > 1 else [])
    if step.name in ("view", "_unsafe_view"):
        # Ids are expanded, which `view` may refuse where the tensor itself is contiguous.
        return step.move(val, lambda ids: ids.reshape(step.value("size")))
    return step.move(val)


@rule("im2col")
def im2col(step: Step) -> Result | None:
    """Sliding windows of an image; there is no integer kernel, and ids are exact as doubles."""
    return step.move(step.tensor("self"), lambda ids: step.run(ids.double()).long())


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(step: Step) -> Result | None:
    """View channels as (groups, channels in a group) and swap: survivors must fill that rectangle."""
    val, groups = step.tensor("self" if "self" in step.arguments else "input"), int(step.value("groups"))
    split = (val.shape[0], groups, val.shape[1] // groups, *val.shape[2:])
    boxed = step.ids.move(val, lambda ids: ids.reshape(split), [split], step.name, step.why)[0]
    assert boxed is not None
    return step.move(boxed, lambda ids: ids.transpose(1, 2).reshape(val.shape))


@edit("channel_shuffle", "native_channel_shuffle")
def edit_channel_shuffle(edit: Edit) -> None:
    """The number of groups, when whole groups go."""
    name = "self" if "self" in edit.arguments else "input"
    val, groups = edit.val(name), int(edit.value("groups"))
    if edit.survivors.changed(val, 1):
        edit.set("groups", int(edit.survivors.mask(val, 1).reshape(groups, -1).any(axis=1).sum()))


@rule("expand")
def expand(step: Step) -> Result | None:
    """Repeat along new or neutral dimensions; a literal number of repeats can be resized, so its ids are weak."""
    val = step.tensor("self")
    out = step.move(val)
    assert isinstance(out, Val)
    new = out.rank - val.rank
    for d, size in enumerate(step.arguments["size"]):
        if out.shape[d] > 1 and isinstance(size, int) and (d < new or val.shape[d - new] == 1):
            step.ids.put(out, d, step.ids.fresh(out.shape[d]), True, step.why)
    return out


@rule("expand_as")
def expand_as(step: Step) -> Result | None:
    """Broadcast to the shape of another tensor: elementwise as far as ids go."""
    return step.ids.join(step.shape, [step.tensor("self"), step.tensor("other")], step.why)


@rule("cat", "concat", "concatenate")
def cat(step: Step) -> Result | None:
    """Concatenation puts ids one after the other; the other dimensions are tied. Empty operands count for nothing."""
    vals = [val for val in step.vals("tensors") if 0 not in val.shape]
    dim = int(step.value("dim")) % len(step.shape)
    return concatenate(step, vals, dim)


def concatenate(step: Step, vals: list[Val], dim: int) -> Val:
    """The ids of values one after the other along `dim`."""
    rest = [
        Val(tuple(1 if e == dim else k for e, k in enumerate(v.shape)), {e: i for e, i in v.ids.items() if e != dim}, v.weak - {dim})
        for v in vals
    ]
    out = step.ids.join(tuple(1 if e == dim else k for e, k in enumerate(step.shape)), rest, step.why)
    out.shape = step.shape
    if any(dim in v.ids for v in vals):
        parts = [v.ids[dim] if dim in v.ids else torch.zeros(v.shape[dim], dtype=torch.long) for v in vals]
        weak = all(dim in v.weak for v in vals)
        step.ids.put(out, dim, torch.cat(parts), weak, step.why)
        origins = {v.origin.get(dim) for v in vals}
        if len(vals) == 1 and None not in origins:
            out.origin[dim] = vals[0].origin[dim]
    return out


@rule("stack")
def stack(step: Step) -> Result | None:
    """A new dimension, along which nothing varies."""
    dim = int(step.value("dim")) % len(step.shape)
    shape = tuple(1 if e == dim else k for e, k in enumerate(step.shape))
    vals = [step.ids.move(v, lambda ids: ids.unsqueeze(dim), [shape], step.name, step.why)[0] for v in step.vals("tensors")]
    return concatenate(step, [v for v in vals if v is not None], dim)


@rule("pad", "constant_pad_nd")
def pad(step: Step) -> Result | None:
    """Padding with a constant has ids of its own, so that what is next to it can be removed; other modes fix what they pad."""
    val = step.tensor("self")
    amounts = step.value("pad")
    constant = step.name == "constant_pad_nd" or step.arguments.get("mode", "constant") == "constant"
    out = Val(step.shape, dict(val.ids), set(val.weak))
    for d in list(out.ids):
        j = 2 * (val.rank - 1 - d)
        left, right = amounts[j : j + 2] if j + 1 < len(amounts) else (0, 0)
        if left == 0 and right == 0:
            continue
        if constant and left >= 0 and right >= 0:
            out.ids[d] = torch.cat([step.ids.fresh(left), out.ids[d], step.ids.fresh(right)])
        else:
            step.ids.fix(out.ids.pop(d), step.why)
    return out


@rule("index", "index_select")
def index(step: Step) -> Result | None:
    """Indexing by data: the indexed dimensions are fixed, the others move along. A dimension that is looked up at the positions that a router
    picked is tied to what it picked from."""
    val = step.tensor("self")
    if step.name == "index":
        indexed = [d for d, i in enumerate(step.arguments["indices"]) if i is not None]
    else:
        indexed = [int(step.value("dim")) % val.rank]
    for other in step.operands():
        if other is not val:
            step.ids.fix_all(other, f"it is an index of {step.why}")
            if other.points is not None and len(indexed) == 1 and len(other.points) == val.shape[indexed[0]] and indexed[0] in val.ids:
                step.ids.tie(val.ids[indexed[0]], other.points, step.why)
                step.looked_up.append(other)
                val = Val(val.shape, {d: i for d, i in val.ids.items() if d != indexed[0]}, val.weak - set(indexed), dict(val.origin))
    step.ids.fix_all(val, f"it is indexed by {step.why}", indexed)
    return step.move(Val(val.shape, {d: i for d, i in val.ids.items() if d not in indexed}, val.weak - set(indexed)))


@edit("view", "reshape", "_unsafe_view", "expand")
def edit_size(edit: Edit) -> None:
    """The size argument speaks of all output dimensions."""
    name = "shape" if edit.name == "reshape" else "size"
    edit.set(name, edit.resized(list(edit.current[name]), list(range(edit.out.rank))))


@edit("unflatten")
def edit_unflatten(edit: Edit) -> None:
    """The sizes speak of the dimensions that one was split into."""
    sizes = list(edit.current["sizes"])
    first = edit.dim()
    edit.set("sizes", edit.resized(sizes, list(range(first, first + len(sizes)))))


@edit("slice")
def edit_slice(edit: Edit) -> None:
    """Start and end count survivors; with a step, where the picked survivors no longer lie a step apart, they are selected one by one."""
    val, dim = edit.val("self"), edit.dim()
    if not edit.survivors.changed(val, dim):
        return
    stay = edit.survivors.mask(val, dim)
    start, end, step = slice(edit.value("start"), edit.value("end"), edit.value("step")).indices(len(stay))
    if step == 1:
        edit.become(aten.slice.Tensor, edit.node.args[0], dim, int(stay[:start].sum()), int(stay[: max(start, end)].sum()))
        return
    position = np.cumsum(stay) - 1
    picked = [int(position[i]) for i in range(start, end, step) if stay[i]]
    if picked == list(range(picked[0], picked[-1] + 1, step)):
        edit.become(aten.slice.Tensor, edit.node.args[0], dim, picked[0], picked[-1] + 1, step)
        return
    constant = f"{edit.node.name}_picked"
    edit.module.register_buffer(constant, torch.tensor(picked, dtype=torch.long))
    with edit.node.graph.inserting_before(edit.node):
        edit.become(aten.index_select.default, edit.node.args[0], dim, edit.node.graph.get_attr(constant))


@edit("narrow")
def edit_narrow(edit: Edit) -> None:
    """Start and length count survivors."""
    val, dim = edit.val("self"), edit.dim()
    if edit.survivors.changed(val, dim):
        stay = edit.survivors.mask(val, dim)
        start, length = int(edit.value("start")) % len(stay), int(edit.value("length"))
        edit.set("start", int(stay[:start].sum()))
        edit.set("length", int(stay[start : start + length].sum()))


@edit("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split")
def edit_split(edit: Edit) -> None:
    """All become `split_with_sizes`, since equal parts need not stay equal."""
    val, dim = edit.val("self"), edit.dim()
    if edit.survivors.changed(val, dim):
        edit.become(aten.split_with_sizes.default, edit.node.args[0], [edit.survivors.count(out, dim) for out in edit.outs], dim)


@edit("select")
def edit_select(edit: Edit) -> None:
    """The index counts the survivors before it."""
    val, dim = edit.val("self"), edit.dim()
    if edit.survivors.changed(val, dim):
        stay = edit.survivors.mask(val, dim)
        edit.set("index", int(stay[: int(edit.value("index")) % len(stay)].sum()))


@edit("roll")
def edit_roll(edit: Edit) -> None:
    """A shift carries the last elements to the front: as many as survive among them."""
    val, shifts, dims = edit.val("self"), list(edit.value("shifts")), list(edit.value("dims"))
    for j, d in enumerate(dims):
        if edit.survivors.changed(val, d % val.rank):
            stay = edit.survivors.mask(val, d % val.rank)
            shifts[j] = int(stay[len(stay) - shifts[j] % len(stay) :].sum())
    edit.set("shifts", shifts)


@edit("pad", "constant_pad_nd")
def edit_pad(edit: Edit) -> None:
    """Each amount counts the survivors of the padding's own ids."""
    amounts = list(edit.value("pad"))
    changed = False
    for d in edit.out.dims:
        j = 2 * (edit.out.rank - 1 - d)
        if j + 1 < len(amounts) and (amounts[j] or amounts[j + 1]) and edit.survivors.changed(edit.out, d):
            stay = edit.survivors.mask(edit.out, d)
            amounts[j], amounts[j + 1] = int(stay[: amounts[j]].sum()), int(stay[len(stay) - amounts[j + 1] :].sum())
            changed = True
    if changed:
        edit.set("pad", amounts)


@edit("squeeze")
def edit_squeeze(edit: Edit) -> None:
    """Without dimensions it would also squeeze a width that became 1: name the ones that it squeezes now."""
    val = edit.val("self")
    if "dim" not in edit.arguments and any(edit.survivors.changed(val, d) for d in val.dims):
        edit.become(aten.squeeze.dims, edit.node.args[0], [d for d, k in enumerate(val.shape) if k == 1])

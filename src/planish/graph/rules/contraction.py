"""Convolution, linear maps and matrix products: the input's ids are tied to those that the weight contracts, its others are issued."""

from __future__ import annotations

import torch

from planish.graph.edit import Edit, edit
from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("linear")
def linear(step: Step) -> Result | None:
    """`y[..., o] = sum_i x[..., i] w[o, i] + b[o]`."""
    x, weight, bias = step.tensor("input"), step.tensor("weight"), step.val("bias")
    last = x.rank - 1
    step.ids.contract(x, last, weight, 1, step.why)
    step.ids.role(weight, 0, "out")
    step.ids.role(weight, 1, "in")
    out = x.only(range(last), step.shape)
    if 0 in weight.ids:
        out.ids[last] = weight.ids[0]
    add_bias(step, bias, weight.ids.get(0))
    return out


def add_bias(step: Step, bias: Val | None, ids: torch.Tensor | None) -> None:
    """A bias is issued together with the output dimension whose ids are given."""
    if bias is None:
        return
    step.ids.role(bias, 0, "out")
    if 0 in bias.ids and ids is not None:
        step.ids.tie(bias.ids[0], ids, step.why)
    elif ids is not None:
        step.ids.fix(ids, step.why)
    else:
        step.ids.fix_all(bias, step.why)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(step: Step) -> Result | None:
    """Channels are contracted and issued; space and kernel are fixed.

    A grouped convolution stays rectangular in two ways: the same channels of every group go (the default where a group has several),
    or whole groups go (the only way where a group has one input channel: a depthwise convolution).
    """
    transposed = "transpose" in step.name or bool(step.arguments.get("transposed", False))
    x, weight, bias = step.tensor("input"), step.tensor("weight"), step.val("bias")
    groups = int(step.value("groups"))
    if x.rank != weight.rank or (transposed and groups > 1):
        return None
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    step.ids.fix_all(weight, "it is the kernel's size", range(2, weight.rank))
    step.ids.fix_all(x, f"it is space of {step.why}", range(2, x.rank))
    step.ids.role(weight, out_dim, "out")
    step.ids.role(weight, in_dim, "in")
    out = x.only([0], step.shape)
    issued = weight.ids.get(out_dim)
    if groups == 1:
        step.ids.contract(x, 1, weight, in_dim, step.why)
    else:
        assert issued is not None
        tie_groups(step, x, weight, groups)
    if issued is not None:
        out.ids[1] = issued
    add_bias(step, bias, issued)
    return out


def whole_groups(step: Step | Edit, inputs_per_group: int, groups: int) -> bool:
    """Whether whole groups of a grouped convolution go, rather than the same channels of each."""
    if inputs_per_group == 1:
        return True
    ids = step.ids if isinstance(step, Step) else step.program.ids
    return ids.choose(("groups", groups, inputs_per_group), 2) == 1


def tie_groups(step: Step, x: Val, weight: Val, groups: int) -> None:
    """The ties of a grouped convolution between input channels, output channels and the weight's dimension 1."""
    per_group = x.shape[1] // groups
    issued, taken, given = weight.ids[0].view(groups, -1), x.ids.get(1), weight.ids.get(1)
    if whole_groups(step, per_group, groups):
        step.ids.tie(issued, issued[:, :1], step.why)
        if given is not None:
            step.ids.fix(given, step.why)
        if taken is None:
            step.ids.fix(issued, step.why)
        else:
            step.ids.tie(taken.view(groups, per_group), issued[:, :1], step.why)
        return
    assert given is not None
    step.ids.tie(issued, issued[:1], step.why)
    if taken is None:
        step.ids.fix(given, step.why)
    else:
        by_group = taken.view(groups, per_group)
        step.ids.tie(by_group, by_group[:1], step.why)
        step.ids.tie(by_group[0], given, step.why)


@edit("conv1d", "conv2d", "conv3d", "convolution")
def edit_convolution(edit: Edit) -> None:
    """The number of groups, where whole groups go."""
    groups, x = int(edit.value("groups")), edit.val("input")
    if groups > 1 and edit.survivors.changed(x, 1) and whole_groups(edit, x.shape[1] // groups, groups):
        edit.set("groups", int(edit.survivors.mask(x, 1).reshape(groups, -1)[:, 0].sum()))


@rule("matmul", "mm", "bmm", "addmm", "baddbmm")
def matmul(step: Step) -> Result | None:
    """`y[..., i, j] = sum_k a[..., i, k] b[..., k, j]`, with an addend before it for addmm and baddbmm."""
    adds = step.name in ("addmm", "baddbmm")
    a, b = step.operands()[-2:]
    if a.rank < 2 or b.rank < 2:
        return None
    m, n = a.rank, b.rank
    step.ids.contract(a, m - 1, b, n - 2, step.why)
    for val, issued, contracted in ((a, m - 2, m - 1), (b, n - 1, n - 2)):
        step.ids.role(val, issued, "out")
        step.ids.role(val, contracted, "in")
    out = step.ids.join(step.shape[:-2], [a.leading(m - 2), b.leading(n - 2)], step.why)
    out.shape = step.shape
    for val, source, place in ((a, m - 2, out.rank - 2), (b, n - 1, out.rank - 1)):
        if source in val.ids:
            step.ids.put(out, place, val.ids[source], source in val.weak, step.why)
    if not adds:
        return out
    addend = step.tensor("self")
    step.ids.role(addend, addend.rank - 1, "out")
    return step.ids.join(step.shape, [out, addend], step.why)


@rule("einsum")
def einsum(step: Step) -> Result | None:
    """Every letter is one dimension: tied wherever it occurs, issued where the result has it."""
    equation = str(step.arguments["equation"]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    left, _, right = equation.partition("->")
    terms, vals = left.split(","), step.vals("tensors")
    if any(len(set(term)) < len(term) for term in terms):
        return None
    out = Val(step.shape)
    for letter in sorted(set(left) - {","}):
        places = [(val, term.index(letter)) for term, val in zip(terms, vals, strict=True) if letter in term]
        for val, d in places:
            step.ids.role(val, d, "out" if letter in right else "in")
        found = [(d in val.weak, val.ids.get(d)) for val, d in places if val.shape[d] > 1]
        real = sorted(((weak, ids) for weak, ids in found if ids is not None), key=lambda pair: pair[0])
        for _, ids in real[1:]:
            step.ids.tie(ids, real[0][1], step.why)
        if real and len(real) < len(found):
            step.ids.fix(real[0][1], step.why)
        elif real and letter in right:
            step.ids.put(out, right.index(letter), real[0][1], real[0][0], step.why)
    return out

"""Element-wise operators tie what they combine; gates, clamps and masks are among them."""

from __future__ import annotations

from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule(
    "pointwise", "where", "masked_fill", "pow", "rsub", "clamp", "__and__", "__or__", "__xor__", "gelu", "relu6", "hardtanh", "add", "mul"
)
def pointwise(step: Step) -> Result | None:
    """Equal positions are tied under broadcasting; whatever torch tags as pointwise comes here."""
    operands = step.operands()
    for val in operands:
        for d in val.origin:
            step.ids.role(val, d, "affine")
    return step.ids.join(step.shape, operands, step.why)


@rule(
    "to",
    "_to_copy",
    "type_as",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "contiguous",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "fake_quantize_per_tensor_affine",
    "selu",
    "celu",
    "mish",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "leaky_relu",
    "elu",
    "silu",
)
def same(step: Step) -> Result | None:
    """The output has the ids of the first operand."""
    val = step.operands()[0]
    return Val(step.shape, dict(val.ids), set(val.weak), dict(val.origin) if step.name in KEEPS_ORIGIN else {})


KEEPS_ORIGIN = frozenset(
    {"to", "_to_copy", "type_as", "clone", "detach", "alias", "lift_fresh_copy", "contiguous", "fake_quantize_per_tensor_affine"}
)


@rule("fake_quantize_per_channel_affine")
def fake_quantize_per_channel(step: Step) -> Result | None:
    """Scale and zero point have one element per index of the axis."""
    val, axis = step.tensor("self"), int(step.value("axis"))
    for name in ("scale", "zero_point"):
        step.ids.contract(val, axis, step.tensor(name), 0, step.why)
        step.ids.role(step.tensor(name), 0, "affine")
    return Val(step.shape, dict(val.ids), set(val.weak), dict(val.origin))


@rule("prelu", "_prelu_kernel")
def prelu(step: Step) -> Result | None:
    """A slope per channel, or one for all."""
    val, slope = step.tensor("self"), step.tensor("weight")
    if slope.shape and slope.shape[0] > 1:
        step.ids.contract(val, 1, slope, 0, step.why)
        step.ids.role(slope, 0, "affine")
    return Val(step.shape, dict(val.ids), set(val.weak))


@rule("glu")
def glu(step: Step) -> Result | None:
    """The first half is gated by the second."""
    val = step.tensor("self")
    dim = int(step.value("dim")) % val.rank
    out = Val(step.shape, dict(val.ids), set(val.weak))
    if dim in val.ids:
        first, second = val.ids[dim].chunk(2)
        step.ids.tie(first, second, step.why)
        out.ids[dim] = first
    return out

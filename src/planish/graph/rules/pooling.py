"""Pooling and resizing: the last dimensions are space and fixed, channels pass."""

from __future__ import annotations

from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule

SPACE = {
    "max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool3d": 3,
    "max_pool2d_with_indices": 2,
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2,
    "adaptive_avg_pool3d": 3,
    "adaptive_max_pool1d": 1,
    "adaptive_max_pool2d": 2,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
}


@rule(*SPACE)
def pool(step: Step) -> Result | None:
    """Channels and batch keep their ids."""
    x = step.operands()[0]
    space = range(x.rank - SPACE[step.name], x.rank)
    step.ids.fix_all(x, f"it is space of {step.why}", space)
    leading = range(x.rank - SPACE[step.name])
    outs: list[Val | None] = [x.only(leading, shape) for shape in step.shapes if shape is not None]
    return outs if len(outs) > 1 else outs[0]

"""Everything that is found by name: runtimes, saliencies, clusterings, schedules, masks, observers, roundings, schemes, search methods,
and other packages' entry points.

A line of `BUILT_IN` is all that a new method needs besides its own file. Another package extends a kind with an entry point in
the group `planish.KIND` (for example `[project.entry-points."planish.saliency"] mine = "mine.saliency:Mine"`).
Nothing is ever looked up by a module path that came from a file: only names listed here or installed as entry points exist.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

from planish.errors import UnknownName

BUILT_IN: dict[str, dict[str, str]] = {
    "runtime": {
        "onnxruntime": "planish.runtimes.onnxruntime:OnnxRuntime",
        "openvino": "planish.runtimes.openvino:OpenVino",
        "torch": "planish.runtimes.torch:Torch",
        "torch-compile": "planish.runtimes.torch:TorchCompile",
    },
    "saliency": {
        "auto": "planish.prune.saliency.auto:Automatic",
        "fisher": "planish.prune.saliency.labelled:Fisher",
        "flap": "planish.prune.saliency.flap:Fluctuation",
        "fpgm": "planish.prune.saliency.fpgm:GeometricMedian",
        "l1": "planish.prune.saliency.magnitude:L1",
        "magnitude": "planish.prune.saliency.magnitude:Magnitude",
        "norm-scale": "planish.prune.saliency.norm_scale:NormScale",
        "obs": "planish.prune.saliency.obs:SurgeonOrder",
        "random": "planish.prune.saliency.random:Random",
        "taylor": "planish.prune.saliency.taylor:Taylor",
        "taylor-first": "planish.prune.saliency.labelled:FirstTaylor",
    },
    "redundancy": {
        "dbscan": "planish.prune.redundancy.dbscan:Dbscan",
        "kmeans": "planish.prune.redundancy.kmeans:KMeans",
        "mixture": "planish.prune.redundancy.mixture:Mixture",
        "spectral": "planish.prune.redundancy.spectral:Spectral",
    },
    "schedule": {
        "augmented-lagrangian": "planish.prune.schedules.augmented_lagrangian:AugmentedLagrangian",
        "group-lasso": "planish.prune.schedules.lasso:GroupLasso",
        "growing-l2": "planish.prune.schedules.growing_l2:GrowingL2",
        "growth": "planish.prune.schedules.growth:Growth",
        "iterative": "planish.prune.schedules.iterative:Iterative",
        "l1": "planish.prune.schedules.l1:L1",
        "one-shot": "planish.prune.schedules.one_shot:OneShot",
    },
    "masking": {
        "magnitude": "planish.prune.masks.magnitude:MagnitudeMask",
        "sparsegpt": "planish.prune.masks.sparsegpt:SparseGpt",
        "wanda": "planish.prune.masks.wanda:Wanda",
    },
    "observer": {
        "entropy": "planish.quantize.observers.entropy:Entropy",
        "minmax": "planish.quantize.observers.minmax:MinMax",
        "moving-average": "planish.quantize.observers.moving_average:MovingAverage",
        "mse": "planish.quantize.observers.mse:MeanSquaredError",
        "percentile": "planish.quantize.observers.percentile:Percentile",
    },
    "rounding": {
        "adaround": "planish.quantize.rounding.adaround:AdaRound",
        "brecq": "planish.quantize.rounding.brecq:Brecq",
        "gptq": "planish.quantize.rounding.gptq:Gptq",
        "nearest": "planish.quantize.rounding.nearest:Nearest",
    },
    "scheme": {
        "bf16": "planish.quantize.schemes.bf16:BF16",
        "codebook": "planish.quantize.schemes.codebook:CODEBOOK",
        "codebook-mixture": "planish.quantize.schemes.codebook_mixture:CODEBOOK_MIXTURE",
        "fp8": "planish.quantize.schemes.fp8:FP8",
        "int4-weights": "planish.quantize.schemes.int4_weights:INT4_WEIGHTS",
        "int8": "planish.quantize.schemes.int8:INT8",
        "int8-dynamic": "planish.quantize.schemes.int8_dynamic:INT8_DYNAMIC",
        "int8-weights": "planish.quantize.schemes.int8_weights:INT8_WEIGHTS",
        "w4a4": "planish.quantize.schemes.w4a4:W4A4",
        "w4a8": "planish.quantize.schemes.w4a8:W4A8",
    },
    "search": {
        "solver": "planish.search.solver:Solver",
        "random": "planish.search.random:Random",
    },
}


@functools.cache
def _entry_points(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=f"planish.{kind}")}


def names(kind: str) -> list[str]:
    """Every registered name of a kind (a key of `BUILT_IN`), built-in and installed, sorted."""
    return sorted({*BUILT_IN[kind], *_entry_points(kind)})


def check(kind: str, name: str) -> None:
    """Refuse what nobody registered. A saliency may also be several, joined by "+", or a clustering: of weights, or of ":activations".

    Raises:
        UnknownName: the message shows the nearest names.
    """
    if kind != "saliency":
        if name not in names(kind):
            raise UnknownName(kind, name, names(kind))
        return
    clusterings = [f"{method}{of}" for method in names("redundancy") for of in ("", ":weights", ":activations")]
    if name in clusterings:
        return
    for part in name.split("+"):
        if part not in names(kind):
            raise UnknownName(kind, part, [*names(kind), *clusterings])


def get(kind: str, name: str) -> Any:
    """What is registered as `name`: a class, or a `Scheme`.

    Raises:
        UnknownName: nobody registered that name; the message shows the nearest ones.
    """
    if name in BUILT_IN[kind]:
        module, _, attribute = BUILT_IN[kind][name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in _entry_points(kind):
        return _entry_points(kind)[name].load()
    raise UnknownName(kind, name, names(kind))

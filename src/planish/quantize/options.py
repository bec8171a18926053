"""Options for quantization: the loss of each operator when it alone computes in a scheme, measured without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from planish import registry
from planish.data import Split
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import Replay, affordable, in_batches, samples_within, take
from planish.plan import Option
from planish.quantize.alone import candidates, runs_alone
from planish.quantize.contract import Equalization, check_equalization
from planish.quantize.equalize.cross_layer import equalize_layers
from planish.quantize.ground import Ground, folded, ground_of
from planish.runtimes.contract import Runtime
from planish.target import Target

_CHUNK = 64
_LEAST_SAMPLES = 16


@torch.no_grad()
def precision_options(
    graph: Graph,
    analysis: Analysis,
    runtime: Runtime,
    target: Target,
    split: Split,
    schemes: Sequence[str] = ("int8",),
    observer: str = "mse",
    samples: int = 256,
    kind: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    seconds: float | None = None,
    equalization: Equalization = "smooth",
) -> list[Option]:
    """An option for each operator and scheme that fit, with what the outputs lose when it is the only one.

    The loss is the divergence of the outputs from the original's, the same measure that pruning's options carry. Weights and activation
    inputs are rounded as `quantize` would by default: to nearest, whatever rounding the plans ask for. Another method would take minutes for all
    operators and schemes. The nodes before an operator are run once for all operators, those after it once for each.

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        runtime: only operators of kinds that it executes in int8 are offered.
        target: gives the range of the weights.
        split: calibration samples.
        schemes: names of the registry's kind "scheme".
        observer: the registered observer that chooses ranges.
        samples: at most this many are used.
        kind: "logits" or "values"; None guesses from the outputs.
        progress: called with (runs done, runs in all).
        seconds: about what it may take; fewer samples are used where they would take longer, but never fewer than 16.
        equalization: as `quantize` is told; each operator is smoothed for itself, as that does with one that is alone.

    Returns:
        Options in the order of the program; losses are finite and at least 0. `float_reasons` says why others are missing.

    Raises:
        DataError: no calibration sample, or outputs of the original that are not finite.
    """
    check_equalization(equalization)
    make = registry.get("observer", observer)
    net = folded(graph)
    if equalization == "cross-layer":
        equalize_layers(net.module)
    replay = Replay(net.module)
    passes = 0.5 * len(analysis.operators) * len(schemes) + 2
    flat = take(split, samples_within(replay, split, affordable(replay, net, samples), passes, seconds, _LEAST_SAMPLES))
    alone, _ = candidates(Ground(net, flat, make), analysis, runtime, target, schemes, equalization == "smooth")
    chunks = in_batches(flat, _CHUNK)
    reference = [replay.run(replay.start(chunk)) for chunk in chunks]
    measure = divergence([torch.cat(values) for values in zip(*reference, strict=True)], kind)
    losses = dict.fromkeys(((operator.name, operator.scheme) for operator in alone), 0.0)
    done = 0
    for chunk, outputs in zip(chunks, reference, strict=True):
        for ran in runs_alone(replay, alone, chunk):
            losses[ran.operator.name, ran.operator.scheme] += float(measure.per_sample(ran.outputs, outputs).double().sum())
            done += 1
            if progress is not None:
                progress(done, len(chunks) * len(alone))
    found = [Option("precision", name, scheme, max(loss / len(flat[0]), 0.0)) for (name, scheme), loss in losses.items()]
    return [option for option in found if math.isfinite(option.loss)]


@torch.no_grad()
def float_reasons(graph: Graph, analysis: Analysis, runtime: Runtime, target: Target, split: Split, samples: int = 64) -> dict[str, str]:
    """Operators that multiply and have no static int8 form -> why: no kernel, or weights or inputs that cannot be quantized."""
    _, reasons = candidates(ground_of(graph, split, "minmax", samples), analysis, runtime, target, ("int8",), is_smooth=False)
    return reasons

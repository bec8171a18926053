"""Options for masks: the loss of each pattern of each operator when it alone is masked, measured without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from planish import registry
from planish.data import Split
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import Environment, Replay, affordable, evaluating, in_batches, samples_within, take
from planish.plan import Option
from planish.prune.masks.contract import Masking
from planish.prune.masks.pattern import Pattern, parse_pattern
from planish.prune.masks.subjects import Subject, subjects
from planish.runtimes.storage import is_worth_packing

aten = torch.ops.aten
_CHUNK = 64
_LEAST_SAMPLES = 24
_BYTES = 4


@torch.no_grad()
def mask_options(
    graph: Graph,
    analysis: Analysis,
    method: str,
    patterns: Sequence[str],
    split: Split,
    keep: Sequence[str] = (),
    samples: int = 256,
    kind: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    seconds: float | None = None,
) -> list[Option]:
    """An option for each operator and pattern, with what the outputs lose when that operator alone is masked.

    The loss is the divergence of the outputs from the original's, the same measure that pruning's options carry. The nodes before an
    operator are run once, those behind it once for each pattern.

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        method: a registered masking.
        patterns: what is offered, where a file is smaller for it. N:M is not where the input channels are no multiple of M.
        split: calibration inputs.
        keep: globs of parameters that must be left alone.
        samples: at most this many are used.
        kind: "logits" or "values"; None guesses from the outputs.
        progress: called with (runs done, runs in all).
        seconds: about what it may take; fewer samples are used where they would take longer, but never fewer than 24.

    Returns:
        Options with finite losses of at least 0, in the order of the program; of an operator, more zeros anywhere never lose less than fewer.
    """
    replay = Replay(graph.module)
    make: Masking = registry.get("masking", method)()
    known = subjects(replay, analysis, keep)
    offered = {name: _offered(subject, patterns) for name, subject in known.items()}
    total = sum(len(offered[name]) for name in known)
    with evaluating(graph):
        count = samples_within(replay, split, affordable(replay, graph, samples), 0.5 * total + 2, seconds, _LEAST_SAMPLES)
        chunks = in_batches(take(split, count), _CHUNK)
        reference = [replay.run(replay.start(chunk)) for chunk in chunks]
        measure = divergence([torch.cat(values) for values in zip(*reference, strict=True)], kind)
        values: list[Environment] = [replay.start(chunk) for chunk in chunks]
        generator, reached, found = torch.Generator().manual_seed(0), 0, []
        for name, subject in ((name, subject) for name, subject in known.items() if offered[name]):
            node = subject.operator.node
            while reached < replay.position[node]:
                for environment in values:
                    replay.step(replay.nodes[reached], environment)
                reached += 1
            moments, worst = subject.moments(replay, values, generator), 0.0
            for text, pattern in offered[name].items():
                weight, shift = subject.masked(make, pattern, moments)
                changed, shifts = {subject.operator.weight: weight}, {}
                if subject.operator.bias is not None or any(user.target == aten.batch_norm.default for user in node.users):
                    shifts[node] = shift.reshape(-1, *[1] * len(subject.operator.stride))  # there is a place for it
                losses = [
                    measure.per_sample(replay.run(dict(environment), reached, changed, shifts), outputs).double()
                    for environment, outputs in zip(values, reference, strict=True)
                ]
                loss = max(float(torch.cat(losses).mean()), 0.0)
                if not pattern.of:
                    loss = worst = max(worst, loss)
                found.append(Option("mask", name, text, loss))
                if progress is not None:
                    progress(len(found), total)
    return [option for option in found if math.isfinite(option.loss)]


def _offered(subject: Subject, patterns: Sequence[str]) -> dict[str, Pattern]:
    """The patterns that an operator can take and that make a file smaller, fewest zeros first."""
    parsed = {text: parse_pattern(text) for text in patterns}
    rows, columns = len(subject.weight), subject.weight[0].numel()
    return {
        text: pattern
        for text, pattern in sorted(parsed.items(), key=lambda item: item[1].sparsity)
        if (not pattern.of or subject.weight.shape[1] % pattern.of == 0)
        and is_worth_packing(rows * columns, rows * (columns - pattern.gone(columns)), _BYTES)
    }

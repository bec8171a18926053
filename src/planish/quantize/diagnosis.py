"""The diagnosis of quantization: what the outputs lose to each operator alone, and what they lose to all but it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from planish import registry
from planish.data import Split
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import Replay, affordable, samples_within, spread, take
from planish.measurement import Diagnosis, Sensitivity
from planish.metrics import Metric, get_metric
from planish.plan import FULL_PRECISION
from planish.quantize.alone import Alone, Ran, candidates, runs_alone
from planish.quantize.apply import quantize_on
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.contract import Equalization
from planish.quantize.ground import Ground, equalized, folded
from planish.quantize.schemes.int8 import INT8
from planish.quantize.subjects import chosen_nodes
from planish.runtimes.contract import Runtime
from planish.target import Target

_MOST_DB = 200.0
"""float32 tells about 140 dB apart: what is above this is equal."""
_CALIBRATED, _LEAST_CALIBRATED, _LEAST = 300, 16, 4
_CALIBRATING_PASSES, _CALIBRATING_SHARE = 6, 0.25
"""Watching takes about so many runs of each sample, and may take this share of the time."""
_SATURATED = 0.01
_GAIN_DB, _AUDIBLE_DB, _LOST_DB = 6.0, 30.0, 10.0
"""An operator is named where leaving it out of int8 takes three quarters of the noise away (6 dB), and the noise matters at all: above 30 dB
rounding is a thirtieth of the outputs, and labels hardly change. Below 10 dB it is a third of them."""


@dataclass(frozen=True)
class _Figures:
    """What outputs are worth; `quality` is None where the metric has no finite value."""

    sqnr_db: float
    quality: float | None


@dataclass
class _Told:
    """Progress: `progress` is called with (runs done, runs in all)."""

    of: int
    progress: Callable[[int, int], None] | None
    done: int = 0

    def one_more(self) -> None:
        """One more run is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.of)


@dataclass(frozen=True)
class _Judge:
    """Outputs of some samples, judged by how far they are from those in float and by a metric."""

    reference: list[Any]
    metric: Metric
    targets: Any

    def sqnr_db(self, outputs: Sequence[Any]) -> float:
        """The lowest over the outputs that are floating-point tensors, within ±200."""
        pairs = [(a, b) for a, b in zip(self.reference, outputs, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
        return min((_within(sqnr_db(a, b)) for a, b in pairs), default=_MOST_DB)

    def figures(self, outputs: Sequence[Any]) -> _Figures:
        """Both figures of some outputs."""
        found = self.metric.score(_arrays(outputs), self.targets)
        return _Figures(self.sqnr_db(outputs), found if math.isfinite(found) else None)


def _within(ratio_db: float) -> float:
    return -_MOST_DB if math.isnan(ratio_db) else max(-_MOST_DB, min(ratio_db, _MOST_DB))


@torch.no_grad()
def diagnose(
    graph: Graph,
    analysis: Analysis,
    precisions: Mapping[str, str],
    runtime: Runtime,
    target: Target,
    calibration: Split,
    judged: tuple[str, Split] | None = None,
    metric: Metric | None = None,
    schemes: Sequence[str] = (INT8.name,),
    observer: str = "mse",
    samples: int = 128,
    calibrated: int = _CALIBRATED,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    equalization: Equalization = "smooth",
) -> Diagnosis:
    """What each operator that the plan quantizes, or could, costs the outputs: alone, and as the one that is left out.

    All figures are of rounding after training, without bias correction. "Alone" is one run for each operator and scheme, from a shared
    prefix. "All but it" is the graph that `quantize` builds of the plan without that operator, on the same ranges; the operators that lose
    most come first, so that they have their figures when the time is up.

    Args:
        graph: in float; left as it is.
        analysis: of that graph.
        precisions: the plan: operator name -> scheme; an operator that is not named stays in fp32.
        runtime, target: where it is to run.
        calibration: what ranges are chosen on.
        judged: a split and its name; the calibration data by default.
        metric: by which outputs are judged too. One that needs labels that are missing, or that is a function of the user's, which may take
            long and need more samples, gives way to "agreement" for logits and "cosine" otherwise.
        schemes: in which every operator is tried alone, besides its own.
        observer: the registered observer that chooses ranges.
        samples: of the judged split, at most.
        calibrated: of the calibration data, at most.
        seconds: about what it may take: fewer samples are used, but never fewer than 4, and operators may stay without figures of all but them.
        progress: called with (runs done, runs in all).
        equalization: as `quantize` is told; what the whole plan's smoothing gave stays when an operator is left out.

    Raises:
        DataError: no sample, or outputs in float that are not finite.
    """
    began = time.monotonic()
    net = folded(graph)
    replay = Replay(net.module)
    share = None if seconds is None else _CALIBRATING_SHARE * seconds
    enough = samples_within(replay, calibration, calibrated, _CALIBRATING_PASSES, share, _LEAST_CALIBRATED)
    ground = Ground(net, take(calibration, enough), registry.get("observer", observer))
    tried = list(dict.fromkeys([*(name for name in schemes if name in runtime.schemes), *_schemes(precisions)]))
    found, _ = candidates(ground, analysis, runtime, target, tried, is_smooth=equalization == "smooth")
    alone = [one for one in found if one.scheme in schemes or precisions.get(one.name) == one.scheme]
    rows = _rows(alone, analysis, precisions)
    name, split = judged or ("calibration", calibration)
    passes = 0.5 * len(alone) + len(rows) + 2
    left = None if seconds is None else max(0.0, seconds - (time.monotonic() - began))
    count = samples_within(replay, split, affordable(replay, net, samples), passes, left, _LEAST)
    shown = split.take(spread(split, count))
    flat = take(shown, count)
    judge = _judge(replay.run(replay.start(flat)), metric, shown)
    told = _Told(len(alone) + len(rows), progress)
    for ran in runs_alone(replay, alone, flat):
        rows[ran.operator.name] = _with_run(rows[ran.operator.name], ran, judge)
        told.one_more()

    every = chosen_nodes(analysis, {row: rows[row].tried if rows[row].scheme == FULL_PRECISION else rows[row].scheme for row in rows})
    smoothed = equalized(ground, every.values(), runtime, target, equalization)

    def judged_as(plan: Mapping[str, str]) -> _Figures:
        module = quantize_on(smoothed, analysis, plan, runtime, target, bias_correction=False).graph.module
        return judge.figures(list(module(*flat)))

    everything = judged_as(precisions)
    order = sorted(rows, key=lambda row: worst_db(rows[row]))
    for row in order:
        if seconds is not None and time.monotonic() - began > seconds:
            break
        rows[row] = _with_others(rows[row], precisions, everything, judged_as)
        told.one_more()
    operators = tuple(rows[row] for row in order)
    return Diagnosis(
        metric=judge.metric.name,
        split=name,
        samples=len(flat[0]),
        quality=judge.figures(judge.reference).quality,
        sqnr_db=everything.sqnr_db,
        quality_all=everything.quality,
        operators=operators,
        findings=(*_findings(operators, list(rows), judge.metric.name, name), *_shared_blame(operators, everything.sqnr_db)),
    )


def worst_db(row: Sensitivity) -> float:
    """What an operator is ranked by: the ratio in static int8, which every cure is compared with; else the worst that it was tried in."""
    return row.sqnr_alone_db.get(INT8.name, min(row.sqnr_alone_db.values(), default=_MOST_DB))


def _schemes(precisions: Mapping[str, str]) -> list[str]:
    return [scheme for scheme in precisions.values() if scheme != FULL_PRECISION]


def _rows(alone: Sequence[Alone], analysis: Analysis, precisions: Mapping[str, str]) -> dict[str, Sensitivity]:
    """A row without figures for each operator, in the order of the program."""
    forms: dict[str, list[str]] = {}
    for one in alone:
        forms.setdefault(one.name, []).append(one.scheme)
    rows = {}
    for name, schemes in forms.items():
        scheme = precisions.get(name, FULL_PRECISION)
        otherwise = INT8.name if INT8.name in schemes else schemes[0]
        tried = otherwise if scheme == FULL_PRECISION else scheme
        rows[name] = Sensitivity(name=name, kind=analysis.operators[name].kind, scheme=scheme, tried=tried)
    return rows


def _with_run(row: Sensitivity, ran: Ran, judge: _Judge) -> Sensitivity:
    """The row with the figures of a run of its operator alone."""
    scheme, found = ran.operator.scheme, judge.figures(ran.outputs)
    return msgspec.structs.replace(
        row,
        sqnr_alone_db=row.sqnr_alone_db | {scheme: found.sqnr_db},
        quality_alone=row.quality_alone | ({} if found.quality is None else {scheme: found.quality}),
        clipped=row.clipped if (share := _clipped(ran)) is None else share,
    )


def _clipped(ran: Ran) -> float | None:
    """The share of the activations of an operator that lie outside the ranges of its quantizers; None without static ranges."""
    outside = total = 0
    for position, rounding in ran.operator.activations.items():
        if (quantizer := rounding.quantizer) is not None:
            values, half = rounding.scaled(ran.inputs[position]), 0.5 * quantizer.scale
            outside += int(((values < quantizer.low - half) | (values > quantizer.high + half)).sum())
            total += values.numel()
    return outside / total if total else None


def _with_others(
    row: Sensitivity, precisions: Mapping[str, str], everything: _Figures, judged_as: Callable[[Mapping[str, str]], _Figures]
) -> Sensitivity:
    """The row with the figures of the plan with its operator and without it: one is the plan itself, the other is built and run."""
    if row.scheme == FULL_PRECISION:
        among, without = judged_as({**precisions, row.name: row.tried}), everything
    else:
        among, without = everything, judged_as({name: scheme for name, scheme in precisions.items() if name != row.name})
    return msgspec.structs.replace(
        row,
        sqnr_with_db=among.sqnr_db,
        quality_with=among.quality,
        sqnr_without_db=without.sqnr_db,
        quality_without=without.quality,
    )


def _judge(reference: list[Any], metric: Metric | None, split: Split) -> _Judge:
    """How the outputs are judged: by the metric where it can be, else without labels."""
    kinds = divergence(reference).kinds
    if metric is None or not metric.is_fast or (metric.needs_labels and split.targets is None):
        metric = get_metric("agreement" if kinds[0] == "logits" else "cosine")
    return _Judge(reference, metric, split.targets if metric.needs_labels else _arrays(reference))


def _arrays(outputs: Sequence[Any]) -> list[Any]:
    return [torch.as_tensor(value).numpy() for value in outputs]


def _findings(operators: Sequence[Sensitivity], order: Sequence[str], metric: str, split: str) -> list[str]:
    """What stands out, in sentences: operators that saturate, and those that most of the loss comes from."""
    found = []
    for row in operators:
        place = " (the first operator)" if row.name == order[0] else " (the last operator)" if row.name == order[-1] else ""
        if row.clipped is not None and row.clipped > _SATURATED:
            found.append(
                f"{row.name}{place}: {100 * row.clipped:.2g} % of its activations on {split} are outside the range that calibration gave them "
                "and are clipped in static int8; give calibration data that looks like it, or another --observer"
            )
        if said := _broken(row, metric):
            found.append(f"{row.name}{place} {said}")
    return found


def _shared_blame(operators: Sequence[Sensitivity], all_db: float) -> list[str]:
    """A sentence where the outputs are lost and no operator that is left out brings them back.

    That is so where several lose much, and where a runtime wants the outputs of operators rounded too: what an operator in fp32 reads is
    then rounded all the same.
    """
    measured = [row for row in operators if row.scheme != FULL_PRECISION and row.sqnr_without_db is not None]
    best = max(measured, key=lambda row: row.sqnr_without_db or 0.0, default=None)
    if best is None or best.sqnr_without_db is None or all_db > _LOST_DB or best.sqnr_without_db - all_db >= _GAIN_DB:
        return []
    said = (
        f"the outputs keep {all_db:.0f} dB, and no operator is to blame alone: without {best.name}, the best to leave out, they keep "
        f"{best.sqnr_without_db:.0f} dB; what helps is several operators in fp32, or schemes without calibrated ranges "
        "(--schemes int8-dynamic,int8-weights)"
    )
    return [said]


def _broken(row: Sensitivity, metric: str) -> str:
    """Why an operator is named: most of the noise is its own; or ""."""
    if row.sqnr_with_db is None or row.sqnr_without_db is None:
        return ""
    if row.sqnr_with_db > _AUDIBLE_DB or row.sqnr_without_db - row.sqnr_with_db < _GAIN_DB:
        return ""
    change = f"from {row.sqnr_without_db:.0f} to {row.sqnr_with_db:.0f} dB"
    if row.quality_with is not None and row.quality_without is not None:
        change += f", {metric} from {row.quality_without:.4g} to {row.quality_with:.4g}"
    if row.scheme == FULL_PRECISION:
        return f"is kept in fp32: in {row.tried} it would take the outputs {change}"
    return f"in {row.scheme} loses most of what quantization loses: it takes the outputs {change}"

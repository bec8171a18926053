"""What `optimize` hands back: the verdict, both measurements, every trial, and what the report page needs. JSON, but for the module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from planish.budget import Budget
from planish.measurement import Diagnosis, Estimate, Machine, Measurement, Outcome
from planish.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from planish.artifact import Artifact

Verdict = Literal["met", "infeasible", "undecided"]
EXIT_CODES: Mapping[str, int] = {"met": 0, "infeasible": 3, "undecided": 4}


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One plan that was judged.

    Args:
        plan: what was done.
        stage: "candidate" (evaluated in PyTorch), "trial" (exported and measured in the target) or "winner" (recovered and verified).
        outcome: how it ended.
        loss: label-free loss on calibration data after compensation (lower is closer to the original).
        drop: quality lost on validation, in the metric's unit; None where it was not evaluated.
        predicted_latency_s: what the tables said.
        latency_ratio: optimized ÷ original, paired and interleaved in the target; None for candidates.
        macs: of the compressed graph, for one call.
        size_bytes: of the exported model; None for candidates.
        peak_memory_bytes: where a limit on memory was given.
        seconds: what the trial took.
    """

    plan: Plan
    stage: str
    outcome: Outcome
    loss: float | None = None
    drop: float | None = None
    predicted_latency_s: float | None = None
    latency_ratio: Estimate | None = None
    macs: int | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0


class OperatorRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One operator, before and after, for the report.

    Args:
        name, kind: as in the graph.
        width_before, width_after: output channels; None where it has none.
        precision: scheme it runs in ("fp32", "int8"), or "removed".
        time_before_s, time_after_s: the measured latency, shared out as the target's latency table says; None where it has none.
        why: why it was not made faster, or "".
    """

    name: str
    kind: str
    width_before: int | None = None
    width_after: int | None = None
    precision: str = "fp32"
    time_before_s: float | None = None
    time_after_s: float | None = None
    why: str = ""


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the search says of itself.

    Args:
        method: its registered name.
        candidates, trials: how many of each were judged.
        gap: duality gap of the last solution, as a share of what it minimised; None where the method has none.
        kkt_residual: of the last solution.
        affine: (constant seconds, factor) of the correction fitted to measured trials.
        tilt: precision -> a further factor of its predicted seconds, fitted to the same trials.
    """

    method: str
    candidates: int = 0
    trials: int = 0
    gap: float | None = None
    kkt_residual: float | None = None
    affine: tuple[float, float] | None = None
    tilt: dict[str, float] = {}


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything of a result that is plain data: what `--json` prints from, what the study keeps and what the page shows.

    Args:
        name: of the job.
        verdict: "met", "infeasible" or "undecided".
        reason: one sentence: why that verdict.
        target: "runtime:device" of the artifact.
        budget: as asked.
        metric: its name.
        higher_is_better: of the metric.
        original, optimized: both measured in the target, interleaved in the same run; optimized is None when nothing was measured.
        baselines: the original in every other runtime, eager and compiled included, by "runtime:device".
        elsewhere: their latency ÷ the original's where it is quickest, paired.
        ratios: optimized ÷ original: "latency" (an Estimate, paired), "size", "memory", "macs", "bit_operations".
        drop: quality lost on `split`, in the metric's unit (positive is worse); None without data.
        drop_interval: its paired bootstrap interval, of 95 % or the budget's confidence.
        split: "test", or "validation" or "evaluate" (then the verdict is selection-biased and says so).
        control_drop: drop against the dense control that was tuned on as many samples; None without control=True.
        control_quality: the control's quality on `split`.
        plan: the chosen plan; None when the original itself is the answer and nothing was changed.
        trials: all of them, in order.
        time_limited: whether the budget was missed because the time was up, and not because nothing could meet it.
        nearest: indices into `trials` of the nearest ones on each limit, when infeasible.
        operators: before and after.
        groups: prunable groups -> (units before, units after).
        search: what the search says of itself.
        seconds: stage -> wall seconds; "total" is the whole call.
        history: figures of the plan's schedule while units left, in order: the multiplier and KKT residual of constrained training, say.
        notes: sentences that a reader of the figures must know.
        diagnosis: what each operator loses when it leaves fp32; None where the plan quantizes none.
        machine: where it was measured.
        artifact: path of what was written, or None.
        seed, threads: as used.
    """

    name: str
    verdict: Verdict
    reason: str
    target: str
    budget: Budget
    metric: str
    higher_is_better: bool
    original: Measurement
    optimized: Measurement | None
    baselines: dict[str, Measurement] = {}
    elsewhere: dict[str, Estimate] = {}
    ratios: dict[str, Estimate] = {}
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    split: str = ""
    control_drop: float | None = None
    control_quality: float | None = None
    plan: Plan | None = None
    trials: tuple[Trial, ...] = ()
    time_limited: bool = False
    nearest: tuple[int, ...] = ()
    operators: tuple[OperatorRow, ...] = ()
    groups: dict[str, tuple[int, int]] = {}
    search: Search = Search(method="none")
    seconds: dict[str, float] = {}
    history: tuple[dict[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    diagnosis: Diagnosis | None = None
    machine: Machine | None = None
    artifact: str | None = None
    seed: int = 0
    threads: int = 1

    @property
    def said(self) -> str:
        """The verdict with its reason, as it is shown: not "infeasible" where nobody knows that it is."""
        return self.reason if self.time_limited else f"{self.verdict}: {self.reason}"

    @property
    def exit_code(self) -> int:
        """What the command line returns: 0 met, 3 infeasible, 4 undecided."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """The object that `optimize --json` prints; ratios and intervals as plain numbers, the rest nested under its own name."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        data["ratios"] = {name: estimate.median for name, estimate in self.ratios.items()}
        data["ratio_intervals"] = {name: [estimate.low, estimate.high] for name, estimate in self.ratios.items()}
        data["stages"] = data["seconds"]
        data["seconds"] = self.seconds.get("total", 0.0)
        return data


class Result:
    """What `planish.optimize` returns: the plain data of `summary`, the artifact and the compressed module.

    Attributes:
        summary: everything that is plain data; its fields are also readable here (`result.verdict`, `result.drop`, ...).
        module: the compressed `nn.Module`, taking and giving what the original did.
        artifact: what was written, or None when nothing was.
    """

    def __init__(self, summary: Summary, module: nn.Module | None, artifact: Artifact | None) -> None:
        self.summary, self.module, self.artifact = summary, module, artifact

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "summary":
            raise AttributeError(name)
        return getattr(self.summary, name)

    def to_json(self) -> dict[str, Any]:
        """The object that `optimize --json` prints."""
        return self.summary.to_json()

    @property
    def path(self) -> Path | None:
        """Where the artifact is, or None."""
        return Path(self.summary.artifact) if self.summary.artifact else None

    def __repr__(self) -> str:
        ratio = self.summary.ratios.get("latency")
        speed = f", latency {ratio.median:.2f}x" if ratio else ""
        return f"Result({self.summary.verdict}: {self.summary.reason}{speed}, drop {self.summary.drop})"

"""What was asked for: the arguments of `optimize`, checked before anything heavy is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish import registry
from planish.artifact import default_folder, study_folder
from planish.budget import Budget
from planish.errors import BudgetError, UnknownName, UsageError
from planish.measure.machine import usable_cores
from planish.metrics import get_metric
from planish.plan import DEFAULT_OBSERVER, DEFAULT_ROUNDING, DEFAULT_SALIENCY, DEFAULT_SCHEMES, DEFAULT_TECHNIQUES, ONE_SHOT, TECHNIQUES
from planish.prune.masks.pattern import parse_masking
from planish.prune.order import is_clustering, needs_labels
from planish.prune.saliency.labelled import unlabelled
from planish.runtimes.contract import get_runtime
from planish.target import parse_target

if TYPE_CHECKING:
    from planish.workload import Workload


@dataclass(frozen=True)
class Request:
    """What was asked for, checked.

    Args:
        target: as the user wrote it.
        budget: limits and drop.
        out: where the artifact goes.
        search, saliency, schedule: registered names.
        masking: a registered name, perhaps with a pattern behind a colon.
        schemes: what operators may compute in.
        observer, rounding: registered names.
        trials: candidates at most.
        time_limit: seconds of the whole call; None: as long as the default recovery takes.
        seed: of everything random.
        techniques: which may be used.
        keep: globs of parameters that must be left alone.
        threads: of one call.
        control, overwrite, accept_nearest: as `optimize` says.
    """

    target: str
    budget: Budget
    out: Path
    search: str
    saliency: str
    schedule: str
    masking: str
    schemes: tuple[str, ...]
    observer: str
    rounding: str
    trials: int
    time_limit: float | None
    seed: int
    techniques: tuple[str, ...]
    keep: tuple[str, ...]
    threads: int
    control: bool
    overwrite: bool
    accept_nearest: bool

    @property
    def needs_labels(self) -> bool:
        """Whether the saliency needs samples with labels."""
        return "prune" in self.techniques and needs_labels(self.saliency)

    @property
    def study_folder(self) -> Path:
        """Where the trials are kept: beside the artifact."""
        return study_folder(self.out)

    def identity(self) -> dict[str, Any]:
        """What a study must have been started with to be carried on."""
        return {
            "target": self.target,
            "search": self.search,
            "saliency": self.saliency,
            "schedule": self.schedule,
            "masking": self.masking if "mask" in self.techniques else None,
            "schemes": list(self.schemes) if self.schemes != DEFAULT_SCHEMES else None,
            "observer": self.observer if self.observer != DEFAULT_OBSERVER else None,
            "rounding": self.rounding if self.rounding != DEFAULT_ROUNDING else None,
            "trials": self.trials,
            "techniques": list(self.techniques),
            "keep": list(self.keep),
            "threads": self.threads,
            "control": self.control,
        }


def _schemes(target: str, schemes: Sequence[str] | None) -> tuple[str, ...]:
    """What operators may compute in: what was named, checked against the target; else the usual ones, of which each runtime takes its own."""
    if schemes is None:
        return DEFAULT_SCHEMES
    named = (schemes,) if isinstance(schemes, str) else tuple(schemes)
    if not named:
        raise UsageError(f"schemes: give at least one of {', '.join(registry.names('scheme'))}")
    runtimes = [name for name in registry.names("runtime") if target in ("cpu", name) or target.startswith(f"{name}:")]
    for name in named:
        registry.check("scheme", name)
        if not any(name in get_runtime(runtime, require=False).schemes for runtime in runtimes):
            reason = registry.get("scheme", name).refusal or f"{', '.join(runtimes)} cannot execute it"
            raise UsageError(f"schemes: {name!r} cannot run on {target!r}: {reason}")
    return named


def checked(
    job: Workload,
    *,
    target: str = "cpu",
    budget: Budget | None = None,
    out: str | Path | None = None,
    search: str = "solver",
    trials: int = 20,
    time_limit: float | None = None,
    seed: int = 0,
    techniques: Sequence[str] = DEFAULT_TECHNIQUES,
    keep: Sequence[str] = (),
    threads: int | None = None,
    control: bool = False,
    overwrite: bool = False,
    accept_nearest: bool = False,
    saliency: str | None = None,
    schedule: str = ONE_SHOT,
    masking: str | None = None,
    schemes: Sequence[str] | None = None,
    observer: str | None = None,
    rounding: str | None = None,
) -> Request:
    """The arguments of `optimize`, checked without touching data, model or disk.

    Raises:
        UsageError: the first that makes no sense. DataError: a saliency that needs labels, where no split can have any.
    """
    parse_target(target, registry.names("runtime"))
    masking_name = parse_masking(masking or "sparsegpt")[0]
    named = {
        "search": search,
        "saliency": saliency or DEFAULT_SALIENCY,
        "schedule": schedule,
        "masking": masking_name,
        "observer": observer or DEFAULT_OBSERVER,
        "rounding": rounding or DEFAULT_ROUNDING,
    }
    for kind, name in named.items():
        registry.check(kind, name)
    chosen = (techniques,) if isinstance(techniques, str) else tuple(techniques)
    for technique in chosen:
        if technique not in TECHNIQUES:
            raise UnknownName("technique", str(technique), TECHNIQUES)
    if not chosen:
        raise UsageError(f"techniques: give at least one of {', '.join(TECHNIQUES)}")
    if masking is not None and "mask" not in chosen:
        raise UsageError(f"masking: {masking!r} says which weights become zero; it needs the technique mask; got {', '.join(chosen)}")
    if schemes is not None and "quantize" not in chosen:
        raise UsageError(f"schemes: they say what operators compute in; that needs the technique quantize; got {', '.join(chosen)}")
    wanted_schemes = _schemes(target, schemes)
    if "adapt" in chosen and "prune" not in chosen:
        raise UsageError(f"techniques: adapt leaves a map where a block goes; it needs prune as well; got {', '.join(chosen)}")
    if "prune" in chosen and job.train is None and job.validation is None and needs_labels(saliency or DEFAULT_SALIENCY):
        raise unlabelled(saliency or DEFAULT_SALIENCY)
    if schedule != ONE_SHOT and not {"prune", "distill"} <= set(chosen):
        raise UsageError(
            f"schedule: {schedule!r} prunes while the net trains; it needs the techniques prune and distill; got {', '.join(chosen)}"
        )
    if schedule != ONE_SHOT and saliency is not None and is_clustering(saliency):
        raise UsageError(f"schedule: a clustering merges units at once; with {schedule!r} give a saliency; got {saliency!r}")
    for what, number, least in (("trials", trials, 1), ("seed", seed, 0), ("threads", 1 if threads is None else threads, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UsageError(f"{what}: give a whole number of at least {least}; got {number!r}")
    if time_limit is not None and not 0 < time_limit < float("inf"):
        raise UsageError(f"time_limit: give seconds above zero; got {time_limit!r}")
    wanted = budget or Budget()
    if any(limit.quantity == "energy" for limit in wanted.limits):
        raise BudgetError("energy: this machine cannot tell what a call uses, so nothing can be promised; give a latency")
    if out is not None and Path(out).suffix == ".study":
        raise UsageError(f"out: {out} is where the trials are kept; give another name, such as {Path(out).with_suffix('.planish')}")
    if isinstance(job.metric, str) and job.evaluate is None:
        metric = get_metric(job.metric)
        wanted.allowed_drop.check(metric.name, metric.low, metric.high)
    if job.evaluate is not None and wanted.confidence is not None:
        raise UsageError("confidence: evaluate gives one figure and no interval, so there is no upper end to judge; leave --confidence out")
    has_judge = job.evaluate is not None or job.validation is not None or job.train is not None
    if not wanted.limits and not has_judge:
        raise UsageError(
            "budget: without a limit the quality that is lost is what ends the search, and there is no data to judge it on; "
            "give validation data (or train, or evaluate), or a limit such as latency='0.5x'"
        )
    return Request(
        target,
        wanted,
        Path(out) if out is not None else default_folder(job.name),
        search,
        saliency or DEFAULT_SALIENCY,
        schedule,
        masking or "sparsegpt",
        wanted_schemes,
        observer or DEFAULT_OBSERVER,
        rounding or DEFAULT_ROUNDING,
        trials,
        time_limit,
        seed,
        chosen,
        (keep,) if isinstance(keep, str) else tuple(keep),
        threads or usable_cores(),
        control,
        overwrite,
        accept_nearest,
    )

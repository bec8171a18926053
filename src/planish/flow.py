"""The flow, in order: capture → options → search → winner → artifact. The one file that knows it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from planish import registry
from planish.artifact import check_output, study_folder
from planish.budget import Budget
from planish.clock import FINAL_S, Clock
from planish.errors import MissingFile, OutputExists, StudyError, UsageError
from planish.events import Events, Silent
from planish.measure.machine import machine
from planish.plan import DEFAULT_OBSERVER, DEFAULT_TECHNIQUES, ONE_SHOT, Plan
from planish.request import Request, checked
from planish.study.store import CONCLUDED, Meta, Study, lock_folder
from planish.target import parse_target

if TYPE_CHECKING:
    from planish.result import Result
    from planish.workload import Workload

_REST = 2.5
"""What capture, the original's measurement and int8 in each runtime take together, as a multiple of the first two."""
_COMPILED_FROM_S = 1200.0
"""With less time than this, compiled torch (a minute to compile) is left out of the table."""


def optimize(
    job: Workload,
    target: str = "cpu",
    budget: Budget | None = None,
    out: str | Path | None = None,
    *,
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
    events: Events | None = None,
) -> Result:
    """Make a trained net meet a budget in its target runtime, on this machine, and write it with the proof.

    Args:
        job: the model, its data and metric.
        target: "cpu" measures every runtime that is installed and keeps the best; "openvino:cpu" asks for one.
        budget: limits and drop; without limits: as fast as possible within the drop.
        out: the artifact's directory; `NAME.planish` by default. The trials are kept in `NAME.study` beside it.
        search: the registered search method.
        trials: candidates that are judged at most.
        time_limit: seconds for the whole call; without one recovery sees five epochs, 25 minutes at most.
        seed: of everything random.
        techniques: any of "prune", "quantize", "distill"; "adapt": blocks that go may leave a linear map, fitted by least squares; and "mask",
            offered under a limit on the size alone: it makes nothing faster.
        keep: globs of parameters that must be left alone.
        threads: of one call in the target, at most; all usable cores by default. Fewer are taken where that costs less than a tenth,
            or where they hold a limit on latency with room to spare.
        control: also tune the uncompressed net on as many samples, and report the drop against it (on top of `time_limit`).
        overwrite: replace an artifact (and its study) that is there.
        accept_nearest: write the nearest net when nothing holds the budget.
        saliency: which units of a group go first, "auto" by default (obs where it takes seconds, taylor elsewhere); several joined by "+"; or a clustering, whose units are merged.
        schedule: how units leave: at once ("one-shot"), in rounds with recovery between ("iterative"), behind gates from which they may return
            ("growth"), or driven to zero while the net trains ("l1", "group-lasso", "growing-l2"; "augmented-lagrangian", which also
            decides on the widths). All but the first use half of the recovery's time.
        masking: who chooses which weights are zero, "sparsegpt" by default, "wanda" or "magnitude"; behind a colon the one pattern that is
            offered, as in "wanda:2:4" or "sparsegpt:60%".
        schemes: what operators may compute in besides fp32: any of "int8" (static), "int8-dynamic", "int8-weights", "int4-weights", "codebook",
            "codebook-mixture", "w4a8", "w4a4", and "bf16" for whatever stays in float; by default all but "w4a8", "w4a4" and the mixture, of
            which each runtime is tried with those that it executes.
        observer: how ranges are chosen on calibration data: "mse" by default, "minmax", "moving-average", "percentile" or "entropy".
        rounding: which grid point stands for each weight: the "nearest" by default; "gptq", "adaround" or "brecq" look at what the layer, or the
            residual branch, computes with it, and cost seconds to minutes for each net that is tried.
        events: is told of the run's progress.

    Returns:
        The result; its verdict is "met", "infeasible" or "undecided".

    Raises:
        UsageError: bad arguments, data or model; the message says what to do.
        RuntimeFailed: no runtime runs the original.
    """
    request = checked(
        job,
        target=target,
        budget=budget,
        out=out,
        search=search,
        trials=trials,
        time_limit=time_limit,
        seed=seed,
        techniques=techniques,
        keep=keep,
        threads=threads,
        control=control,
        overwrite=overwrite,
        accept_nearest=accept_nearest,
        saliency=saliency,
        schedule=schedule,
        masking=masking,
        schemes=schemes,
        observer=observer,
        rounding=rounding,
    )
    check_output(request.out, overwrite)
    return _run(job, request, events or Silent(), resuming=False)


def resume(
    out: str | Path,
    job: Workload | None = None,
    *,
    time_limit: float | None = None,
    overwrite: bool = False,
    accept_nearest: bool = False,
    fork: bool = False,
    threads: int | None = None,
    events: Events | None = None,
) -> Result:
    """Carry on a run that was interrupted, from the trials in its study; none that was finished is done again.

    Args:
        out: the artifact's directory that the run was given.
        job: the same job; needed, since a study holds no code.
        time_limit: seconds for the rest of the work.
        overwrite, accept_nearest, events: as for `optimize`.
        fork: the job has changed: start anew, from the old study's plans.
        threads: must be what the run was started with; taken from the study by default.

    Raises:
        MissingFile: there is no study beside `out`. StudyError: it belongs to another job; the message names what differs.
    """
    path = Path(out)
    folder = study_folder(path)
    if not folder.exists():
        raise MissingFile(
            f"resume: there is no study at {folder}: nothing was tried yet; start with `planish optimize JOB.PY --out {path}`"
        )
    with Study.open(folder, shared=True) as study:
        kept, is_over = study.meta, study.count(CONCLUDED) > 0
    if job is None:
        raise UsageError(f"resume: a study holds no code, so the job is needed again: planish resume {path} JOB.PY")
    if is_over and path.exists() and not overwrite and not fork:
        raise OutputExists(f"resume: {path} is finished; look at it with `planish report {path}`, or give --overwrite to conclude it anew")
    known = dict(kept.arguments)
    if threads is not None and threads != known["threads"]:
        raise StudyError(f"resume: the run was started with --threads {known['threads']}; got {threads}; leave --threads out")
    request = checked(
        job,
        budget=kept.budget,
        out=path,
        time_limit=time_limit,
        seed=kept.seed,
        overwrite=overwrite,
        accept_nearest=accept_nearest,
        **known,
    )
    check_output(request.out, overwrite)
    return _run(job, request, events or Silent(), resuming=True, fork=fork)


def _run(job: Workload, request: Request, events: Events, *, resuming: bool, fork: bool = False) -> Result:
    from planish.conclude import conclude
    from planish.pursuit import Pursuit
    from planish.recovery import LEAST_S
    from planish.winners import best_winner
    from planish.workbench import prepare, targets_for

    clock = Clock(request.time_limit, events)
    if not request.budget.limits:
        events.say("no limits: the fastest net within the allowed drop is sought; `--latency 0.5x`, say, stops at a budget")
    if request.time_limit is None and "distill" in request.techniques:
        events.say("no time limit: recovery may take 25 minutes; `--time-limit SECONDS` bounds the whole call")
    targets = targets_for(request.target, request.threads)
    work = request.study_folder.with_name(f".{request.study_folder.stem}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(work)
    except OSError as err:
        raise UsageError(f"out: {work.parent} cannot be written to ({err.strerror}); give another --out") from err
    try:
        for left in work.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        compiled = request.time_limit is None or request.time_limit >= _COMPILED_FROM_S
        labels_for = request.saliency if request.needs_labels else ""
        with prepare(job, targets, request.keep, work, request.seed, events, clock, compiled=compiled, labels_for=labels_for) as bench:
            meta = Meta(
                job.fingerprint(bench.data), request.budget, request.identity(), request.seed, machine().fingerprint, request.out.name
            )
            least_s = _REST * clock.elapsed_s + FINAL_S
            if request.time_limit is not None and least_s + LEAST_S > request.time_limit:
                events.say(
                    f"the time limit of {request.time_limit:.0f} s leaves no time for recovery, and may be exceeded: "
                    f"what cannot be left out takes about {least_s:.0f} s"
                )
            with _study(request, meta, resuming, fork) as study:
                if resuming and not fork:
                    kept = [f"{len(study.finished(stage))} {stage}s" for stage in ("candidate", "trial", "winner")]
                    events.say(f"carrying on from {request.study_folder}: {', '.join(kept)} are kept")
                pursuit = Pursuit(bench, request, study)
                winner = best_winner(pursuit) if pursuit.search_plans() else None
                return conclude(bench, request, study, pursuit, winner)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _study(request: Request, meta: Meta, resuming: bool, fork: bool) -> Study:
    """The study of this run: a new one, or the one that is carried on."""
    folder = request.study_folder
    if resuming and not fork:
        return Study.open(folder, meta)
    if not folder.exists():
        return Study.create(folder, meta)
    with Study.open(folder) as before:
        if resuming:
            return Study.create(folder, meta, before, _plans(before))
        owner = before.meta.out or request.out.name
        if not request.overwrite and owner != request.out.name:
            raise OutputExists(f"study: {folder} holds the trials of {owner}; give another --out, or --overwrite to lose them")
        if not request.overwrite and not before.count(CONCLUDED):
            raise OutputExists(
                f"study: {folder} holds an interrupted run; carry it on with `planish resume {request.out}`, or give --overwrite"
            )
        return Study.create(folder, meta, before)


def _plans(study: Study) -> list[Plan]:
    """What a study would hand on: what it was given and had no time for, then its trials and candidates that could be measured."""
    done = [*study.finished("trial"), *study.finished("candidate")]
    waiting = [stored.plan for stored in study.unfinished("candidate")]
    return [*waiting, *(stored.plan for stored in done if stored.outcome is not None and stored.outcome.kind == "measured")]


def dry_run(
    job: Workload, target: str = "cpu", budget: Budget | None = None, *, events: Events | None = None, **arguments: Any
) -> Inspection:
    """What `optimize` would do with the same arguments, and about how long it would take; nothing is measured or written."""
    from planish.inspection import work_plan

    request = checked(job, target=target, budget=budget, **arguments)
    return Inspection(work_plan(job, request, events or Silent()))


@dataclass(frozen=True)
class Inspection:
    """What `inspect` or `dry_run` found: plain data."""

    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The object that `inspect --json` prints."""
        return self.data


def inspect(
    job: Workload,
    target: str = "cpu",
    keep: Sequence[str] = (),
    events: Events | None = None,
    *,
    sensitivity: bool = False,
    observer: str = DEFAULT_OBSERVER,
) -> Inspection:
    """What could be done to a model, without doing any of it: operators, groups, blocks, and why the rest stays as it is.

    Args:
        job: the workload; its data is read for the sensitivity alone.
        target: where it is to run; the first runtime of several is asked for its schemes.
        keep: globs of parameters that must be left alone.
        events: is told of the progress.
        sensitivity: also what every operator costs the outputs in each scheme, alone and as the one that is left out of int8.
        observer: how ranges are chosen for that.
    """
    from planish.inspection import describe

    parse_target(target, registry.names("runtime"))
    registry.check("observer", observer)
    where = None
    if sensitivity:
        from planish.workbench import targets_for

        where = targets_for(target, None)[0]
    return Inspection(json.loads(msgspec.json.encode(describe(job, keep, events or Silent(), where, observer))))

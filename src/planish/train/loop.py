"""The training loop: a captured graph, a loss and a budget of samples or seconds; in place, seeded, and never an exception for a divergence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from planish.data import Split
from planish.graph.graph import Graph
from planish.graph.modes import set_mode, short_name
from planish.train.averaging import Average, write_
from planish.train.checkpoint import Checkpoint
from planish.train.muon import Muon, convolved_weights
from planish.train.norms import has_batch_norm, recalibrate_batch_norm
from planish.train.precision import Arithmetic, choose
from planish.train.scales import ScaleSteps, scales_of
from planish.train.schedule import Schedule
from planish.workload import settled_randomness

_SNAPSHOT_STEPS = 50
_CHECKPOINT_S = 20.0
_PROBED_STEPS = 60  # from this many steps on, a probe of the arithmetic costs less than it can save
_NORM_SAMPLES = 1024  # images: many thousand values per channel
_AVERAGE_STEPS = 4  # the average takes in every fourth step


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        samples: training samples to see; several epochs of a smaller split.
        learning_rate: the peak for SGD at `batch_size`; AdamW takes `adamw_ratio` of it, Muon `muon_ratio`.
        batch_size: samples in a step.
        optimizer: "sgd" (Nesterov, momentum 0.9), "muon" (Muon for the filters of dense convolutions, SGD for the rest), "adamw", or
            "auto": Muon where the program has batch norm, AdamW elsewhere.
        weight_decay: of weights with two or more axes; norms and biases have none.
        adamw_ratio: AdamW's peak rate over SGD's: 0.02 gives 4e-4, a usual rate for fine-tuning small Transformers.
        muon_ratio: Muon's peak rate over SGD's. 0.4 with 0.02: a step of at most 0.8 % of a weight's norm.
        scale_ratio: the peak rate of quantizers' scales over SGD's: by what share of itself a scale changes in a step.
        clip: bound on the norm of the gradient over all parameters.
        warm_up: share of the schedule over which the rate rises.
        average: how far the weights' average reaches back, as a share of the steps; 0: none.
        dropout: whether dropout is active; off, since a compressed net that follows a teacher rarely has capacity to spare.
        seed: of the order of the samples and of everything random in the loss and `augment`.
    """

    samples: int
    learning_rate: float = 0.02
    batch_size: int = 64
    optimizer: str = "auto"
    weight_decay: float = 5e-4
    adamw_ratio: float = 0.02
    muon_ratio: float = 0.4
    scale_ratio: float = 0.5
    clip: float = 5.0
    warm_up: float = 0.05
    average: float = 0.05
    dropout: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """What a loss gets beside the outputs.

    Args:
        rows: the samples' indices in the split, [batch].
        inputs: flat inputs as the graph got them.
        targets: [batch, ...], or None.
        is_augmented: whether `inputs` differ from the split's.
    """

    rows: NDArray[np.int64]
    inputs: list[Tensor]
    targets: Tensor | None
    is_augmented: bool


Loss = Callable[[tuple[Tensor, ...], Batch], Tensor]


@dataclass(frozen=True)
class FitReport:
    """What training did.

    Args:
        samples, steps: how many were seen and made.
        seconds: wall time, all in all.
        samples_per_s: of the steps alone.
        optimizer: "sgd", "muon" or "adamw".
        arithmetic: layout and precision that the probe chose.
        kept: which weights stand now: "before", "last" or "average", by the judge's loss; "last" without a judge.
        losses: the judge's loss of each candidate.
        diverged: whether loss or gradient stopped being finite; the last good weights were put back.
        ended: "finished", "deadline", "asked" or "diverged".
    """

    samples: int
    steps: int
    seconds: float
    samples_per_s: float
    optimizer: str
    arithmetic: Arithmetic
    kept: str
    losses: dict[str, float]
    diverged: bool
    ended: str


def fit(
    graph: Graph,
    split: Split,
    loss: Loss,
    settings: Settings,
    *,
    augment: Callable[[list[Tensor]], list[Tensor]] | None = None,
    judge: Callable[[], float] | None = None,
    deadline: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    keep_best: bool = True,
    after_step: Callable[[float, float], None] | None = None,
) -> FitReport:
    """Train `graph.module` in place on `split`; it is left in evaluation mode, in the plain memory layout.

    Args:
        graph: every floating-point parameter is trained.
        split: samples; reshuffled by the seed in every epoch.
        loss: gets the flat outputs (train mode, fp32) and the batch, gives a scalar.
        settings: see `Settings`.
        augment: flat inputs -> flat inputs.
        judge: a loss of the graph on data that is not trained on, in evaluation mode; the best of the weights before, the last ones and their
            average is kept.
        deadline: `time.monotonic()` seconds by which the schedule has decayed to zero and the judge has decided.
        progress: called as `progress(samples done, samples in all)` after every step.
        should_stop: asked before every step; True ends training as the deadline does.
        checkpoint: saved now and then and at the end; where it holds something, training goes on from there.
        keep_best: whether the weights before are a candidate.
        after_step: called after every step of the optimizer, without gradients, with SGD's learning rate at that step (others take a fixed ratio
            of it) and the share of training that is done; it may change parameters in place (a proximal step, a mask), which then are what
            snapshots and the average see.

    References:
        Nesterov momentum: Sutskever et al. 2013. AdamW: Loshchilov and Hutter 2019. Muon: Jordan et al. 2024.
    """
    if settings.samples < 1:
        raise ValueError(f"samples: must be at least 1; got {settings.samples}")
    with settled_randomness(settings.seed):
        run = _Run(graph, split, loss, settings, augment, judge, deadline, checkpoint, keep_best, after_step)
        return run.run(progress, should_stop)


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        graph: Graph,
        split: Split,
        loss: Loss,
        settings: Settings,
        augment: Callable[[list[Tensor]], list[Tensor]] | None,
        judge: Callable[[], float] | None,
        deadline: float | None,
        checkpoint: Checkpoint | None,
        keep_best: bool,
        after_step: Callable[[float, float], None] | None,
    ) -> None:
        self.graph, self.split, self.loss, self.settings = graph, split, loss, settings
        self.augment, self.judge, self.deadline, self.keep_best = augment, judge, deadline, keep_best
        self.checkpoint, self.after_step = checkpoint, after_step
        self.began = time.monotonic()
        self.batch_size = min(settings.batch_size, split.n)
        self.parameters = [p for p in graph.module.parameters() if p.is_floating_point()]
        self.name = settings.optimizer if settings.optimizer != "auto" else ("muon" if has_batch_norm(graph) else "adamw")
        self.arithmetic = Arithmetic()
        self.losses: dict[str, float] = {}

    def run(self, progress: Callable[[int, int], None] | None, should_stop: Callable[[], bool] | None) -> FitReport:
        required = [p.requires_grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            before = self._state()
            judging = self._judge("before")
            saved = self.checkpoint.load(before) if self.checkpoint is not None else None
            if saved is not None:
                self._restore(saved.state)
            steps = math.ceil(self.settings.samples / self.batch_size)
            self._train_mode()
            is_over = saved is not None and saved.progress >= 1.0
            if not is_over and (self.deadline is None or time.monotonic() < self.deadline):
                self.arithmetic = choose(self.graph, self._probe, steps >= _PROBED_STEPS)
            self.arithmetic.arrange_parameters_(self.graph)
            # two more judgements come after the last step, each with a recalibration of the norms, which costs about as much
            deadline = None if self.deadline is None else self.deadline - 4 * judging
            schedule = Schedule(self.settings.samples, self.settings.warm_up, deadline)
            if saved is not None:
                schedule.resume(saved.samples, saved.progress)
            average = Average(self.parameters, 1 - 1 / max(2.0, self.settings.average * steps / _AVERAGE_STEPS))
            stepping = time.monotonic()
            ended, good = self._steps(schedule, average, before, progress, should_stop)
            stepping = time.monotonic() - stepping
            if is_over:
                kept = "last"
                self._judge(kept)
            elif schedule.done == 0:
                kept = "before"
                self._restore(before)
            else:
                kept = self._keep(before, good if ended == "diverged" else None, average)
            if self.checkpoint is not None and schedule.done:
                self.checkpoint.save(schedule.done, 1.0, self._state())
        finally:
            Arithmetic().arrange_parameters_(self.graph)
            set_mode(self.graph, False)
            for parameter, was in zip(self.parameters, required, strict=True):
                parameter.requires_grad_(was)
                parameter.grad = None
        return FitReport(
            samples=schedule.done,
            steps=schedule.steps,
            seconds=time.monotonic() - self.began,
            samples_per_s=schedule.done / max(stepping, 1e-9),
            optimizer=self.name,
            arithmetic=self.arithmetic,
            kept=kept,
            losses=self.losses,
            diverged=ended == "diverged",
            ended=ended,
        )

    def _steps(
        self,
        schedule: Schedule,
        average: Average,
        before: list[Tensor],
        progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> tuple[str, list[Tensor]]:
        optimizers = self._optimizers()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        peaks = [group["lr"] for group in groups]
        good, saved_at = before, time.monotonic()
        for batch in self._batches(schedule.done):
            if schedule.is_finished:
                return ("finished" if schedule.done >= schedule.planned else "deadline"), good
            if should_stop is not None and should_stop():
                return "asked", good
            size = len(batch.rows)
            factor = schedule.factor(size)
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * factor
            for parameter in self.parameters:
                parameter.grad = None
            value = self._loss(batch, self.arithmetic)
            value.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip, foreach=True)
            if not (math.isfinite(value.item()) and math.isfinite(norm.item())):
                return "diverged", good
            for optimizer in optimizers:
                optimizer.step()
            schedule.advance(size)
            if self.after_step is not None:
                with torch.no_grad():
                    self.after_step(self.settings.learning_rate * factor, schedule.progress)
            if self.settings.average > 0 and schedule.steps % _AVERAGE_STEPS == 0:
                average.update()
            if schedule.steps % _SNAPSHOT_STEPS == 0:
                good = self._state()
                if self.checkpoint is not None and time.monotonic() - saved_at > _CHECKPOINT_S:
                    self.checkpoint.save(schedule.done, schedule.progress, good)
                    saved_at = time.monotonic()
            if progress is not None:
                progress(schedule.done, schedule.done + schedule.remaining)
        raise AssertionError("the batches never end")

    def _loss(self, batch: Batch, arithmetic: Arithmetic) -> Tensor:
        with arithmetic.autocast():
            outputs = self.graph.module(*arithmetic.arrange(batch.inputs))
        return self.loss(tuple(out.float() if out.is_floating_point() else out for out in outputs), batch)

    def _batches(self, skipped: int) -> Iterator[Batch]:
        """Batches without end, from where `skipped` samples were seen before."""
        generator = np.random.default_rng(self.settings.seed)
        rows = np.empty(0, np.int64)
        while True:
            while len(rows) < self.batch_size:
                rows = np.concatenate([rows, generator.permutation(self.split.n)])
            picked, rows = rows[: self.batch_size], rows[self.batch_size :]
            if skipped >= len(picked):
                skipped -= len(picked)
                continue
            yield self._batch(picked)

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        ((arrays, targets),) = self.split.batches(len(rows), rows)
        inputs = [torch.from_numpy(array) for array in arrays]
        if self.augment is not None:
            inputs = self.augment(inputs)
        return Batch(rows, inputs, None if targets is None else torch.from_numpy(targets), self.augment is not None)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        if self.name not in ("sgd", "muon", "adamw"):
            raise ValueError(f"optimizer: must be 'sgd', 'muon', 'adamw' or 'auto'; got {self.name!r}")
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        filters = [p for p in convolved_weights(self.graph) if any(p is other for other in self.parameters)] if self.name == "muon" else []
        scales = scales_of(self.graph)
        rest = [p for p in self.parameters if not any(p is other for other in (*filters, *scales))]
        weights, others = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]
        groups = [{"params": some, "weight_decay": share} for some, share in ((weights, decay), (others, 0.0)) if some]
        out: list[torch.optim.Optimizer] = [Muon(filters, rate * self.settings.muon_ratio, weight_decay=decay)] if filters else []
        if scales:
            out.append(ScaleSteps(scales, rate * self.settings.scale_ratio))
        if groups and self.name == "adamw":
            out.append(torch.optim.AdamW(groups, lr=rate * self.settings.adamw_ratio, fused=True))
        elif groups:
            out.append(torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True))
        return out

    def _train_mode(self) -> None:
        set_mode(self.graph, True)
        if self.settings.dropout:
            return
        for node in self.graph.module.graph.nodes:
            if "dropout" in short_name(node):
                node.update_arg(2, False)
            elif short_name(node) == "scaled_dot_product_attention":
                if len(node.args) > 4:
                    node.update_arg(4, 0.0)
                elif "dropout_p" in node.kwargs:
                    node.update_kwarg("dropout_p", 0.0)
        self.graph.module.recompile()

    def _probe(self, arithmetic: Arithmetic) -> None:
        """One forward and backward pass on the first samples that leaves parameters, statistics and gradients as they were."""
        buffers = [buffer.clone() for buffer in self.graph.module.buffers()]
        arithmetic.arrange_parameters_(self.graph)
        try:
            self._loss(self._batch(np.arange(min(self.batch_size, 32))), arithmetic).backward()  # type: ignore[no-untyped-call]
        finally:
            Arithmetic().arrange_parameters_(self.graph)
            write_(list(self.graph.module.buffers()), buffers)
            for tensor in (*self.parameters, *self.graph.module.buffers()):
                tensor.grad = None

    def _state(self) -> list[Tensor]:
        return [t.detach().clone() for t in [*self.parameters, *self.graph.module.buffers()]]

    def _restore(self, state: Sequence[Tensor]) -> None:
        write_([*self.parameters, *self.graph.module.buffers()], state)

    def _judge(self, name: str) -> float:
        """Note the judge's loss of the weights that stand now; the seconds it took."""
        began = time.monotonic()
        if self.judge is not None:
            set_mode(self.graph, False)
            self.losses[name] = self.judge()
        return time.monotonic() - began

    def _keep(self, before: list[Tensor], good: list[Tensor] | None, average: Average) -> str:
        """Leave the best of the candidates in the graph: the weights before, the last good ones, and their average."""
        if good is not None:
            self._restore(good)
        candidates = {"before": before}
        set_mode(self.graph, False)
        if good is None or good is not before:
            recalibrate_batch_norm(self.graph, self.split, _NORM_SAMPLES)
            candidates["last"] = self._state()
            self._judge("last")
        if good is None and average.updates and self.judge is not None:
            write_(self.parameters, average.values())
            recalibrate_batch_norm(self.graph, self.split, _NORM_SAMPLES)
            candidates["average"] = self._state()
            self._judge("average")
        if "last" in candidates and not self.keep_best:
            del candidates["before"]
        if self.judge is None:
            kept = "last" if "last" in candidates else "before"
        else:
            kept = min(candidates, key=lambda name: self.losses[name] if math.isfinite(self.losses[name]) else math.inf)
        self._restore(candidates[kept])
        return kept

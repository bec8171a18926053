"""Recovery of a compressed graph: batch norm recalibrated first, then distillation from the original, in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.data import Data
from planish.distill.hints import with_hints
from planish.distill.losses import distillation
from planish.distill.teacher import Teacher
from planish.graph.graph import Graph
from planish.plan import Recovery
from planish.quantize.bias import biases_kept, round_biases_
from planish.train.checkpoint import Checkpoint
from planish.train.loop import Batch, FitReport, Settings, fit
from planish.train.norms import recalibrate_batch_norm
from planish.train.precision import has_fake_quantize
from planish.train.scales import activation_bits, learning_scales
from planish.workload import Workload

_JUDGED, _JUDGED_BATCH = 1024, 128
_QUANTIZED_RATE = 0.2  # of the peak rate: rounding is already right to half a step, and its gradients pass straight through
_FEW_BITS = 4
_COARSE_RATE = 0.6  # with few steps: of ResNet-20's loss in W4A4 20,000 images left 0.144 (from 0.276), and at 0.2 0.157 (from 0.267)


@dataclass(frozen=True)
class RecoverReport:
    """What recovery did.

    Args:
        norms: how many batch norms were recalibrated.
        loss_before: the loss on held-out samples (validation, else calibration) after recalibration and before training.
        loss_after: the same at the end; except for a control never above `loss_before`.
        fit: what training did; None where no samples were asked for.
    """

    norms: int
    loss_before: float
    loss_after: float
    fit: FitReport | None = None

    @property
    def diverged(self) -> bool:
        """Whether training stopped being finite (the last good weights were put back)."""
        return self.fit is not None and self.fit.diverged

    @property
    def samples(self) -> int:
        """Training samples seen."""
        return 0 if self.fit is None else self.fit.samples


def recover(
    graph: Graph,
    teacher: Teacher,
    job: Workload,
    data: Data,
    settings: Recovery,
    seed: int = 0,
    deadline: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    is_control: bool = False,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[float, float], None] | None = None,
    keep_last: bool = False,
    masked: Collection[str] = (),
) -> RecoverReport:
    """Bring `graph` back towards its teacher, in place.

    Args:
        graph: pruned, and fake-quantized or not; `fake_quantize_*` pass gradients straight through, and their scales are trained as well.
        teacher: of the original; best made of the split that is trained on, whose outputs it then keeps for the next recovery.
        job: gives the metric's name (which says what the outputs are), `loss` and `augment`.
        data: trained on `train`, or on calibration inputs where there is none; judged on 1024 samples of validation, else on calibration.
        settings: samples in all, peak rate, batch size.
        seed: of the order of the samples and of augmentation.
        deadline: `time.monotonic()` seconds by which it must have ended.
        progress: called as `progress(samples done, samples in all)`.
        should_stop: asked before every step.
        checkpoint: saved now and then; where it holds something, training goes on from there.
        is_control: for the original itself, tuned: no hints, all of which it meets and which would hold it there, and what training gives is
            kept, since it starts with no distance to its teacher at all.
        penalty: a scalar that is added to the loss of every step.
        after_step: called after every step, see `fit`.
        keep_last: keep what training gives, even where it is further from the teacher than what it began with.
        masked: names of parameters whose zeros stay zero.
    """
    split = data.train if data.train is not None else data.calibration
    norms = recalibrate_batch_norm(graph, split, seed=seed)
    metric = job.metric if isinstance(job.metric, str) and job.evaluate is None else "function"
    hints = teacher.show(None if is_control else graph)
    held, reference = teacher.on(data.validation if data.validation is not None else data.calibration, _JUDGED)
    loss = distillation(metric, reference, split.targets, hints=len(hints))
    own = len(graph.signature.outputs)

    def total(outputs: Sequence[Tensor], wanted: Sequence[Tensor], targets: Tensor | None) -> Tensor:
        value = loss(outputs, wanted, targets)  # without hints where `outputs` are the graph's own
        if job.loss is not None and targets is not None:
            value = value + job.loss(graph.signature.unflatten(list(outputs[:own])), targets)
        return value

    def judge() -> float:
        value = 0.0
        with torch.no_grad():
            for start, (inputs, targets) in enumerate(held.batches(_JUDGED_BATCH)):
                outputs = graph.module(*[torch.from_numpy(array) for array in inputs])
                rows = slice(start * _JUDGED_BATCH, (start + 1) * _JUDGED_BATCH)
                wanted = [out[rows] for out in reference[:own]]
                value += total(outputs, wanted, None if targets is None else torch.from_numpy(targets)).item() * len(inputs[0])
        return value / held.n

    if settings.samples < 1:
        found = judge()
        return RecoverReport(norms, found, found)

    def objective(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        is_known = not batch.is_augmented and teacher.split is split
        wanted = teacher.outputs(batch.rows, batch.inputs) if is_known else teacher.run(batch.inputs)
        value = total(outputs, wanted, batch.targets)
        return value if penalty is None else value + penalty()

    def augment(flat: list[Tensor]) -> list[Tensor]:
        assert job.augment is not None
        changed: Any = job.augment(job.structure(flat))
        return list(job.flatten(changed))

    steps = [after_step] if after_step is not None else []
    with learning_scales(graph):
        if masked:
            steps.append(_zeros_kept(graph, masked))
        if has_fake_quantize(graph):
            steps.append(biases_kept(graph.module))
        report = fit(
            with_hints(graph, hints),
            split,
            objective,
            Settings(settings.samples, learning_rate=_rate(graph, settings), batch_size=settings.batch_size, seed=seed),
            augment=augment if job.augment is not None else None,
            judge=judge,
            deadline=deadline,
            progress=progress,
            should_stop=should_stop,
            checkpoint=checkpoint,
            keep_best=not (is_control or keep_last),
            after_step=_steps(steps),
        )
    # after training: a bias that is rounded in every step cannot take small ones
    round_biases_(graph.module)
    return RecoverReport(norms, report.losses["before"], report.losses[report.kept], report)


def _rate(graph: Graph, settings: Recovery) -> float:
    """The peak rate that suits a graph's grids."""
    if not has_fake_quantize(graph):
        return settings.learning_rate
    return settings.learning_rate * (_COARSE_RATE if activation_bits(graph) <= _FEW_BITS else _QUANTIZED_RATE)


def _steps(steps: Sequence[Callable[[float, float], None]]) -> Callable[[float, float], None] | None:
    """One call that makes all of these, in order; None for none."""

    def after_step(rate: float, progress: float) -> None:
        for step in steps:
            step(rate, progress)

    return after_step if steps else None


def _zeros_kept(graph: Graph, masked: Collection[str]) -> Callable[[float, float], None]:
    """A step after the optimizer's that makes zero again what was zero when this was called."""
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    zeros = [(parameters[name], parameters[name].detach() == 0) for name in masked]

    def after_step(rate: float, progress: float) -> None:
        for parameter, is_zero in zeros:
            parameter.masked_fill_(is_zero, 0.0)

    return after_step

"""The loop learns, is seeded, respects deadline, stop and mode, and survives a divergence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import MobileNet, Recurrent, ResNet, images, randomise_norms, tokens
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.train import loop
from planish.train.checkpoint import Checkpoint
from planish.train.loop import Batch, FitReport, Settings, fit
from planish.train.norms import recalibrate_batch_norm

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(256, 6, generator=GENERATOR)
Y = (X @ torch.randn(6, 3, generator=GENERATOR)).argmax(1)
SPLIT = Split([X.numpy()], Y.numpy(), 256)


def mlp(norm: bool = True) -> Graph:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 32), nn.BatchNorm1d(32) if norm else nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3)]
    return capture(nn.Sequential(*layers).eval(), (X[:2],))


def labels(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
    assert batch.targets is not None
    return F.cross_entropy(outputs[0], batch.targets)


def accuracy(graph: Graph) -> float:
    with torch.no_grad():
        return float((graph.module(X)[0].argmax(1) == Y).float().mean())


def held(graph: Graph) -> Any:
    def judge() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(graph.module(X)[0], Y))

    return judge


@pytest.mark.parametrize(("norm", "optimizer"), [(True, "muon"), (False, "adamw")])
def test_it_learns_with_the_optimizer_of_the_kind(norm: bool, optimizer: str) -> None:
    graph = mlp(norm)
    report = fit(graph, SPLIT, labels, Settings(6000, learning_rate=0.1, adamw_ratio=0.1), judge=held(graph))
    assert report.optimizer == optimizer and report.ended == "finished" and not report.diverged
    assert accuracy(graph) > 0.95
    assert report.kept in ("last", "average") and report.losses[report.kept] == min(report.losses.values()) < report.losses["before"]
    assert report.losses[report.kept] == pytest.approx(held(graph)())
    assert report.steps == 94 and report.samples >= 6000
    assert not graph.module.training and all(p.grad is None for p in graph.module.parameters())


def test_same_seed_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> Tensor:
        graph = mlp()
        fit(graph, SPLIT, labels, Settings(1000, seed=seed))
        return torch.cat([p.detach().flatten() for p in graph.module.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(state, torch.get_rng_state())


def test_every_epoch_sees_every_sample_once() -> None:
    seen: list[int] = []

    def loss(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        seen.extend(batch.rows.tolist())
        np.testing.assert_array_equal(batch.inputs[0].numpy(), X.numpy()[batch.rows])
        return labels(outputs, batch)

    fit(mlp(), SPLIT, loss, Settings(512, batch_size=64))
    assert sorted(seen[:256]) == sorted(seen[256:]) == list(range(256)) and seen[:256] != seen[256:]


def test_a_deadline_ends_with_a_complete_schedule() -> None:
    def slow(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        time.sleep(0.02)
        return labels(outputs, batch)

    graph = mlp()
    began = time.monotonic()
    report = fit(graph, SPLIT, slow, Settings(10_000_000, learning_rate=0.1), deadline=began + 2.0)
    assert report.ended == "deadline" and time.monotonic() - began < 4.0
    assert 10 < report.steps < 110 and accuracy(graph) > 0.6


def test_a_deadline_in_the_past_changes_nothing() -> None:
    graph = mlp()
    before = [t.clone() for t in graph.module.state_dict().values()]
    report = fit(graph, SPLIT, labels, Settings(1000), judge=held(graph), deadline=time.monotonic() - 1)
    assert report.steps == 0 and report.kept == "before"
    assert all(torch.equal(a, b) for a, b in zip(before, graph.module.state_dict().values(), strict=True))


def test_progress_and_stopping() -> None:
    calls: list[tuple[int, int]] = []
    report = fit(mlp(), SPLIT, labels, Settings(640), progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (64, 640) and calls[-1] == (640, 640) and len(calls) == 10
    report = fit(mlp(), SPLIT, labels, Settings(640), should_stop=iter([False, False, True]).__next__)
    assert report.ended == "asked" and report.steps == 2


def _diverging_at(step: int) -> Any:
    count = iter(range(10**6))

    def loss(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return labels(outputs, batch) * (float("nan") if next(count) == step else 1.0)

    return loss


def test_divergence_puts_the_last_good_weights_back() -> None:
    graph = mlp()
    report = fit(graph, SPLIT, _diverging_at(80), Settings(100_000, learning_rate=0.1), judge=held(graph))
    assert report.diverged and report.ended == "diverged" and report.kept == "last"
    assert all(bool(torch.isfinite(t).all()) for t in graph.module.state_dict().values())
    assert accuracy(graph) > 0.9  # the snapshot of step 50
    graph = mlp()
    before = held(graph)()
    report = fit(graph, SPLIT, _diverging_at(3), Settings(1000), judge=held(graph))
    assert report.diverged and report.kept == "before" and held(graph)() == before


def test_an_exploding_rate_never_leaves_a_worse_net() -> None:
    graph = mlp(norm=False)
    before = held(graph)()
    report = fit(graph, SPLIT, labels, Settings(6400, learning_rate=1e6, optimizer="sgd"), judge=held(graph))
    assert held(graph)() <= before * (1 + 1e-6)
    assert report.losses["before"] == pytest.approx(before)


def test_augmented_batches_are_marked() -> None:
    flags: list[bool] = []

    def loss(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        flags.append(batch.is_augmented)
        assert bool((batch.inputs[0] == 0).all())
        return labels(outputs, batch)

    fit(mlp(), SPLIT, loss, Settings(64), augment=lambda flat: [tensor * 0 for tensor in flat])
    assert flags and all(flags)


def test_frozen_parameters_are_trained_and_stay_frozen_for_the_caller() -> None:
    graph = mlp(norm=False)
    for parameter in graph.module.parameters():
        parameter.requires_grad_(False)
    before = [p.clone() for p in graph.module.parameters()]
    fit(graph, SPLIT, labels, Settings(640))
    assert all(not torch.equal(a, b) for a, b in zip(before, graph.module.parameters(), strict=True))
    assert not any(p.requires_grad for p in graph.module.parameters())


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "lstm", "gru"])
def test_real_kinds_of_nets_take_a_few_steps(kind: str) -> None:
    torch.manual_seed(0)
    inputs: Tensor = images(32, 16)[0]
    model: nn.Module
    if kind == "resnet":
        model = ResNet(1, 8)
    elif kind == "mobilenet":
        model = MobileNet()
    else:
        model, inputs = Recurrent(kind, 2, False, 16, 0.3, True), tokens(32)
    graph = capture(randomise_norms(model).eval(), (inputs[:2],))
    split = Split([inputs.numpy()], None, 32)
    recalibrate_batch_norm(graph, split)
    with torch.no_grad():
        wanted = graph.module(inputs)[0].clone()
        for parameter in graph.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    strides = {name: p.stride() for name, p in graph.module.named_parameters()}

    def follow(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return F.mse_loss(outputs[0], wanted[torch.from_numpy(batch.rows)])

    def judge() -> float:
        with torch.no_grad():
            return float(F.mse_loss(graph.module(inputs)[0], wanted))

    report: FitReport = fit(graph, split, follow, Settings(320, batch_size=16, learning_rate=0.01, adamw_ratio=0.1), judge=judge)
    assert report.losses[report.kept] < report.losses["before"]
    assert report.arithmetic.channels_last == (kind in ("resnet", "mobilenet"))
    assert {name: p.stride() for name, p in graph.module.named_parameters()} == strides


class Flattening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).view(x.shape[0], -1))


def test_a_view_that_channels_last_forbids_falls_back_to_the_plain_layout() -> None:
    torch.manual_seed(0)
    inputs = images(32, 8)[0]
    graph = capture(Flattening().eval(), (inputs[:2],))
    split = Split([inputs.numpy()], (np.arange(32) % 3), 32)
    report = fit(graph, split, labels, Settings(64, batch_size=16))
    assert report.steps == 4 and not report.arithmetic.channels_last


class _Killed(BaseException):
    """Ends training as a kill does."""


def _killed_at(samples: int) -> Any:
    def progress(done: int, _: int) -> None:
        if done >= samples:
            raise _Killed

    return progress


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_S", 0.0)
    checkpoint = Checkpoint(tmp_path / "weights" / "phase.safetensors")
    seen: list[int] = []

    def noted(outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        if len(batch.rows) == 64:  # the probe of the arithmetic takes 32
            seen.append(64)
        return labels(outputs, batch)

    settings = Settings(9600, learning_rate=0.1, average=0)
    with pytest.raises(_Killed):
        fit(mlp(), SPLIT, noted, settings, checkpoint=checkpoint, progress=_killed_at(6400))
    saved = checkpoint.load(_state_of(mlp()))
    assert saved is not None and saved.samples == 6400 and saved.progress == pytest.approx(2 / 3, abs=0.01)
    seen.clear()
    graph = mlp()
    report = fit(graph, SPLIT, noted, settings, judge=held(graph), checkpoint=checkpoint)
    assert sum(seen) == 9600 - 6400 and report.samples == 9600 and report.ended == "finished"
    assert accuracy(graph) > 0.95
    seen.clear()
    again = mlp()
    report = fit(again, SPLIT, noted, settings, judge=held(again), checkpoint=checkpoint)
    assert not seen and report.samples == 9600 and report.kept == "last"
    for one, other in zip(_state_of(graph), _state_of(again), strict=True):
        assert torch.equal(one, other)


def _state_of(graph: Graph) -> list[Tensor]:
    return [t.detach() for t in [*(p for p in graph.module.parameters() if p.is_floating_point()), *graph.module.buffers()]]


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "phase.safetensors")
    assert checkpoint.load([]) is None
    checkpoint.save(64, 0.5, [torch.zeros(3)])
    assert checkpoint.load([torch.zeros(4)]) is None and checkpoint.load([torch.zeros(3), torch.zeros(1)]) is None
    found = checkpoint.load([torch.zeros(3)])
    assert found is not None and (found.samples, found.progress) == (64, 0.5)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:40])
    assert checkpoint.load([torch.zeros(3)]) is None
    report = fit(mlp(), SPLIT, labels, Settings(640), checkpoint=checkpoint)
    assert report.samples == 640


def test_a_checkpoint_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    checkpoint = Checkpoint(tmp_path / "file" / "phase.safetensors")
    assert fit(mlp(), SPLIT, labels, Settings(640), checkpoint=checkpoint).samples == 640
    assert checkpoint.load([]) is None


def test_what_is_done_after_every_step_is_what_stays() -> None:
    """The hook sees SGD's rate, rising and falling to nothing, and its zeros are in the last weights and in their average."""
    for wanted in ("last", "average"):
        graph, rates = mlp(), []
        weight = graph.module.get_parameter("0.weight")
        is_zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5

        def after_step(
            rate: float, progress: float, weight: nn.Parameter = weight, is_zero: Tensor = is_zero, rates: list[float] = rates
        ) -> None:
            assert not torch.is_grad_enabled()
            rates.append(rate)
            weight.masked_fill_(is_zero, 0.0)

        losses = iter({"last": [3.0, 1.0, 2.0], "average": [3.0, 2.0, 1.0]}[wanted])
        report = fit(
            graph, SPLIT, labels, Settings(3000, learning_rate=0.1), judge=lambda losses=losses: next(losses), after_step=after_step
        )
        assert report.kept == wanted
        assert len(rates) == report.steps and 0 < rates[0] < max(rates) <= 0.1 and rates[-1] < 0.1 * max(rates)
        assert bool((weight[is_zero] == 0).all()) and bool((weight[~is_zero] != 0).all())

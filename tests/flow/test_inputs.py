"""Every kind of job goes through the whole flow, and what cannot be used is one sentence that says what and where."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import planish
import replaying
import small_jobs
from planish import cli, recovery, trial
from planish.errors import CaptureError, RuntimeFailed
from planish.result import Result


class TwoInTwoOut(nn.Module):
    """Takes and gives dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 64), nn.Linear(8, 64)
        self.scores, self.value = nn.Linear(64, 3), nn.Linear(64, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores (n, 3) and a value (n, 1)."""
        x = torch.relu(self.left(a) + self.right(b))
        return {"scores": self.scores(x), "value": self.value(x)}


class Pair(nn.Module):
    """Takes two tensors by place and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoInTwoOut()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """A value (n, 1)."""
        return self.inner(a, b)["value"]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().eval()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def dict_job() -> planish.Workload:
    a, b = normal(48, 16), normal(48, 8)
    inputs = {"a": a, "b": b}

    def mean_error(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> float:
        return float((outputs["value"][:, 0] - targets).abs().mean())

    net = seeded(TwoInTwoOut)
    with torch.no_grad():
        targets = net(**inputs)["value"][:, 0]
    return planish.Workload(
        model=net,
        example_inputs={"a": a[:2], "b": b[:2]},
        train=[(inputs, targets)],
        validation=[(inputs, targets)],
        metric=mean_error,
        higher_is_better=False,
        name="dicts",
    )


def tuple_job() -> planish.Workload:
    a, b = normal(48, 16), normal(48, 8)
    net = seeded(Pair)
    with torch.no_grad():
        targets = net(a, b)
    data = [((a[i : i + 16], b[i : i + 16]), targets[i : i + 16]) for i in (0, 16, 32)]
    return planish.Workload(model=net, example_inputs=(a[:1], b[:1]), train=data[:2], test=data[2:], metric="rmse", name="tuples")


def unlabelled_job(metric: str) -> planish.Workload:
    x, _ = small_jobs.images(96, seed=2)
    data = [(x[i : i + 32], None) for i in (0, 32, 64)]
    return small_jobs.stripes_job(train=data[:1], validation=data[1:2], test=data[2:], metric=metric)


def evaluated_job() -> planish.Workload:
    x, y = small_jobs.images(64, seed=6)

    def evaluate(predict: Callable[[Any], Any]) -> float:
        return float((predict(x).argmax(1) == y).float().mean())

    return small_jobs.stripes_job(train=None, validation=None, test=None, calibration=[x], evaluate=evaluate)


def tiny_job() -> planish.Workload:
    x, y = small_jobs.images(3, seed=6)
    return small_jobs.stripes_job(train=[(x[:1], y[:1])], validation=[(x[1:2], y[1:2])], test=[(x[2:], y[2:])])


def bare_job() -> planish.Workload:
    return small_jobs.stripes_job(train=None, validation=None, test=None)


def run(job: planish.Workload, tmp_path: Path, **changes: Any) -> Result:
    arguments: dict[str, Any] = {"trials": 1, "threads": 1, "budget": planish.Budget(size="0.9x", drop=0.9)}
    return planish.optimize(job, "onnxruntime:cpu", out=tmp_path / "net.planish", **arguments | changes)


@pytest.fixture(autouse=True)
def _replay(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)
    monkeypatch.setattr(recovery, "_EPOCHS", 1)


@pytest.mark.parametrize(
    "make",
    [
        dict_job,
        tuple_job,
        lambda: unlabelled_job("agreement"),
        pytest.param(lambda: unlabelled_job("cosine"), marks=pytest.mark.slow),
        evaluated_job,
        tiny_job,
        bare_job,
    ],
    ids=["dicts", "tuples", "agreement", "cosine", "evaluate", "one sample each", "no data"],
)
def test_every_kind_of_job(make: Callable[[], planish.Workload], tmp_path: Path) -> None:
    job = make()
    result = run(job, tmp_path)
    assert result.verdict == "met", result.reason
    assert result.ratios["size"].median <= 0.9
    fast = planish.load(result.path, threads=1)
    example = job.example_inputs
    given = {k: v.numpy() for k, v in example.items()} if isinstance(example, dict) else tuple(v.numpy() for v in example)
    got = fast(given) if isinstance(example, dict) else fast(*given)
    wanted = result.module(**example) if isinstance(example, dict) else result.module(*example)
    for a, b in zip(_leaves(got), _leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), atol=0.05 * float(b.detach().abs().max()) + 1e-3)
    assert not _holds_nan(result.to_json())
    if job.evaluate is not None:
        assert result.drop == pytest.approx(result.original.quality - result.optimized.quality)
    elif result.split:
        assert result.drop <= 0.9 and result.drop_interval is not None
    else:
        assert result.drop is None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else [value]


def _holds_nan(data: Any) -> bool:
    if isinstance(data, dict):
        return any(_holds_nan(value) for value in data.values())
    if isinstance(data, (list, tuple)):
        return any(_holds_nan(value) for value in data)
    return isinstance(data, float) and not math.isfinite(data)


def broken(name: str, value: float) -> nn.Module:
    net = small_jobs.trained(steps=2)
    with torch.no_grad():
        net.get_parameter(name).view(-1)[3] = value
    return net


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(planish.PlanishError, match=r"second\.weight"):
        run(small_jobs.stripes_job(broken("second.weight", value)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_no_number_is_named(tmp_path: Path) -> None:
    x, y = small_jobs.images(64, seed=2)
    x[40, 0, 3, 3] = math.nan
    with pytest.raises(planish.PlanishError, match=r"train.*batch 1"):
        run(small_jobs.stripes_job(train=[(x[:32], y[:32]), (x[32:], y[32:])]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_beyond_the_outputs_are_named(tmp_path: Path) -> None:
    x, y = small_jobs.images(64, seed=2)
    with pytest.raises(planish.PlanishError, match=r"4|7"):
        run(small_jobs.stripes_job(validation=[(x, y + 4)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_dead_and_constant_channels_get_a_finite_scale(tmp_path: Path) -> None:
    net = small_jobs.trained()
    with torch.no_grad():
        net.first.weight[:32] = 0
        net.norm.running_var[:8] = 0
        net.second.weight[:4] = 0
        net.second.bias[:4] = -1
    result = run(small_jobs.stripes_job(net), tmp_path, techniques=("prune", "quantize"), trials=2)
    assert result.verdict == "met", result.reason
    assert not _holds_nan(result.to_json())
    x, _ = small_jobs.images(17, seed=4)
    assert np.isfinite(planish.load(result.path, threads=1)(x.numpy())).all()


@pytest.mark.parametrize("kind", ["timed out", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("out of memory", "crashed"))])
def test_a_trial_that_fails_ends_with_its_outcome_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    before, calls = trial.interleaved, 0

    def fails_once(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeFailed(kind, "onnxruntime:cpu, model.onnx: gone")
        return before(*arguments, **named)

    monkeypatch.setattr(trial, "interleaved", fails_once)
    result = run(small_jobs.stripes_job(), tmp_path, techniques=("prune", "quantize"), trials=2)
    assert result.trials[0].outcome.kind == kind
    assert result.verdict == "met", result.reason
    assert not any(t.latency_ratio for t in result.trials if t.outcome.kind == kind)
    assert msgspec.json.encode(result.summary)


def test_an_original_that_no_runtime_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.measure.probe import Probe

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeFailed("unsupported", "onnxruntime:cpu, model.onnx: no operator 'Gargle'")

    monkeypatch.setattr(Probe, "open", refuse)
    with pytest.raises(RuntimeFailed, match="Gargle"):
        run(small_jobs.stripes_job(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_keep_leaves_parameters_alone(tmp_path: Path) -> None:
    result = run(
        small_jobs.stripes_job(), tmp_path, techniques=("prune",), keep=("first.*",), budget=planish.Budget(macs="0.9x", drop=0.9), trials=2
    )
    assert dict(result.module.named_parameters())["first.weight"].shape[0] == 64
    with pytest.raises(planish.PlanishError, match="there is no parameter named 'frist"):
        run(small_jobs.stripes_job(), tmp_path / "more", keep=("frist.*",))


HOSTILE = ["<script>alert('1')</script>", "ü {{brace}} & 'quote'", "n" * 300]


class Hostile(nn.Module):
    """Layers with names that would break out of a page or a file."""

    def __init__(self, names: list[str] = HOSTILE) -> None:
        super().__init__()
        for name, layer in zip(names, (nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 4)), strict=True):
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (n, 4)."""
        first, second, head = self.children()
        return head(torch.relu(second(torch.relu(first(x)))).mean((2, 3)))


def test_hostile_layer_names_pass_through_as_text(tmp_path: Path) -> None:
    result = run(small_jobs.stripes_job(seeded(Hostile)), tmp_path, techniques=("prune", "quantize"))
    assert result.verdict == "met", result.reason
    page = tmp_path / "page.html"
    assert cli.main(["report", str(result.path), "-o", str(page)]) == 0
    assert "<script>alert(" not in page.read_text()
    assert {name for name, _ in result.module.named_parameters()} >= {f"{HOSTILE[0]}.weight"}
    assert planish.load(result.path, threads=1) is not None


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\0b", '") or print("x'])
def test_layer_names_that_would_be_code_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="a layer named"):
        run(small_jobs.stripes_job(seeded(lambda: Hostile([name, *HOSTILE[1:]]))), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "a/b", "\0", "n" * 300, "/etc", "a\nb", ""])
def test_names_that_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(planish.PlanishError, match="name: "):
        small_jobs.stripes_job(name=name)


def test_a_drop_of_everything_is_refused(tmp_path: Path) -> None:
    """Who types 1 means a point: a whole 1 of accuracy would be no limit at all."""
    with pytest.raises(planish.PlanishError, match="or is all of it; give '1pt'"):
        planish.optimize(small_jobs.stripes_job(), budget=planish.Budget(latency="0.5x", drop=1), out=tmp_path / "net.planish")

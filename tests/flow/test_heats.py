"""Plans that bypass different blocks are recovered a little, and the one that comes closest to the original to the end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planish
import replaying
import small_jobs
from planish import recovery, winners


class Killed(BaseException):
    """A run that ends here, whatever catches exceptions."""


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + 0.3 * self.second(torch.relu(self.first(x))))


class _Residual(nn.Module):
    def __init__(self, width: int = 16, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*[_Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, small_jobs.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


@dataclasses.dataclass
class _Recovered:
    plan: str
    stage: str
    graph: Any
    samples: int


def _run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], drop: str = "30pt", **changes: Any
) -> tuple[planish.Result, list[_Recovered]]:
    """A run whose heats end with these losses, in order; and what was recovered."""
    replaying.install(monkeypatch.setattr)
    monkeypatch.setattr(winners, "_AT_STAKE", changes.pop("at_stake", -1.0))
    monkeypatch.setattr(recovery, "_FEWEST_SAMPLES", changes.pop("fewest", 1))
    killed: bool = changes.pop("killed", False)
    done: list[_Recovered] = []
    before = recovery.recover
    left = iter(losses)
    drops = iter(changes.pop("drops", [None] * 9))

    def recover(graph: Any, teacher: Any, job: Any, data: Any, settings: Any, *arguments: Any, checkpoint: Any, **named: Any) -> Any:
        plan, _, stage = checkpoint.path.stem.partition("-")
        report = before(graph, teacher, job, data, settings, *arguments, checkpoint=checkpoint, **named)
        done.append(_Recovered(plan, stage, graph, report.samples))
        if stage == "recovery" and killed:
            raise Killed
        return dataclasses.replace(report, loss_after=next(left)) if stage == "heat" else report

    monkeypatch.setattr(recovery, "recover", recover)
    monkeypatch.setattr(recovery, "lost_on_validation", lambda *_: next(drops))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Residual().eval()
    if changes.pop("resumed", False):
        return planish.resume(tmp_path / "net.planish", small_jobs.stripes_job(net)), done
    result = planish.optimize(
        small_jobs.stripes_job(net),
        "onnxruntime:cpu",
        planish.Budget(latency="0.7x", drop=drop),
        tmp_path / "net.planish",
        techniques=("prune", "distill"),
        trials=8,
        threads=1,
        **changes,
    )
    return result, done


def test_the_rival_that_comes_closest_in_its_heat_is_recovered_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, done = _run(tmp_path, monkeypatch, [3.0, 1.0, 2.0])
    heats = [one for one in done if one.stage == "heat"]
    (last,) = [one for one in done if one.stage == "recovery"]
    assert len({heat.plan for heat in heats}) == len(heats) >= 2
    assert {heat.samples for heat in heats} == {heats[0].samples}, "each sees as many samples"
    assert last.plan == heats[1].plan
    assert last.graph is heats[1].graph, "it goes on from where its heat ended"
    assert result.plan is not None and result.plan.recovery.samples == heats[1].samples + last.samples
    assert result.plan.blocks
    assert "recovery heats" in result.summary.seconds


@pytest.mark.parametrize(("losses", "winner"), [([math.nan, 2.0, 1.0], 2), ([1.0, math.nan, 2.0], 0)])
def test_a_heat_that_ends_with_no_number_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], winner: int) -> None:
    _, done = _run(tmp_path, monkeypatch, losses)
    heats = [one for one in done if one.stage == "heat"]
    (last,) = [one for one in done if one.stage == "recovery"]
    assert last.plan == heats[winner if winner < len(heats) else 1].plan


@pytest.mark.parametrize(("drops", "winner"), [([0.1, 0.3, 0.3], 0), ([0.3, 0.3, 0.05], 2), ([-0.01, -0.02, -0.03], 1)])
def test_what_was_lost_on_validation_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: list[float], winner: int) -> None:
    """Losses that tell little; beyond a tenth of what is allowed a smaller drop is no better."""
    _, done = _run(tmp_path, monkeypatch, [2.2, 2.0, 2.1], drops=drops)
    heats = [one for one in done if one.stage == "heat"]
    (last,) = [one for one in done if one.stage == "recovery"]
    assert len(heats) == 3 and last.plan == heats[winner].plan


def test_a_heat_that_is_too_short_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, done = _run(tmp_path, monkeypatch, [3.0], fewest=10**9)
    assert [one.stage for one in done] == ["heat", "recovery"]
    assert done[0].plan == done[1].plan


def test_a_run_that_is_carried_on_keeps_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        _run(tmp_path, monkeypatch, [3.0, 1.0, 2.0], killed=True)
    monkeypatch.undo()
    result, done = _run(tmp_path, monkeypatch, [9.0], resumed=True)
    assert [one.stage for one in done] == ["heat", "recovery"], "the heat's weights are taken from its checkpoint"
    assert done[0].plan == done[1].plan
    assert result.plan is not None and result.plan.recovery.samples == done[0].samples + done[1].samples


@pytest.mark.parametrize("changes", [{"at_stake": 1e6}, {"time_limit": 60.0}])
def test_no_heats_where_nothing_depends_on_them_or_there_is_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    _, done = _run(tmp_path, monkeypatch, [], **changes)
    assert [one.stage for one in done] == ["recovery"]

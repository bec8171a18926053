"""Adaptors: a linear map in the place of a block that goes, fitted, paid for, cut and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pruning
import pytest
import torch
from torch import Tensor, nn

import nets
import planish
import replaying
import small_jobs
from planish.data import Split
from planish.errors import PlanError
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.interpret import observe
from planish.graph.macs import macs
from planish.plan import Plan
from planish.prune.adaptors import fitted, kinds_of, narrow_adaptors_
from planish.prune.apply import apply
from planish.prune.compensate import compensate
from planish.prune.options import sensitivities
from planish.prune.order import Order, orders
from planish.search.costs import Costs
from planish.search.space import Space


class Linear(nn.Module):
    """A residual branch that is a linear map of rank 3: an adaptor can be all of it."""

    def __init__(self, width: int = 64, spatial: bool = False) -> None:
        super().__init__()
        layer = (lambda a, b: nn.Conv2d(a, b, 1)) if spatial else nn.Linear
        self.entry, self.down, self.up, self.head = layer(5, width), layer(width, 3), layer(3, width), layer(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        x = torch.relu(x + self.up(self.down(x)))
        x = self.head(x)
        return x.mean((2, 3)) if x.dim() == 4 else x


@pytest.mark.parametrize("spatial", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", ["1x1", "rank-3", "rank-2"])
def test_a_linear_branch_is_found_again(spatial: bool, kind: str) -> None:
    torch.manual_seed(0)
    shape = (4, 5, 6, 6) if spatial else (4, 5)
    graph, analysis = pruning.captured(Linear(spatial=spatial).eval(), (torch.randn(shape),))
    (block,) = analysis.blocks.values()
    assert block.adaptor == ("conv" if spatial else "linear") and block.channels == 64 and kinds_of(block) == ("1x1", "rank-16")
    split = pruning.calibration(graph, 256)
    applied = apply(graph, analysis, Plan("onnxruntime:cpu", blocks=(block.name,), adaptors={block.name: kind}), {})
    before = pruning.relative_error(pruning.outputs(applied.graph, split), pruning.outputs(graph, split))
    compensate(applied.graph, graph, applied.kept, split)
    whole = _given(applied.graph, f"adaptor_{block.node}", split)
    narrow_adaptors_(applied.graph, {block.name: kind}, split)
    narrow = _given(applied.graph, f"adaptor_{block.node}", split)
    after = pruning.relative_error(pruning.outputs(applied.graph, split), pruning.outputs(graph, split))
    if kind == "rank-2":  # what is lost has no mean left: the bias makes it good
        channels = 1 if spatial else -1
        lost = (narrow - whole).movedim(channels, -1).flatten(0, -2)
        assert float(lost.mean(0).norm()) < 1e-4 < 1e-3 < float(lost.std(0).norm())
        assert after < before
        return
    assert before > 0.1 and after < 0.01
    shapes = {name: tuple(p.shape[:2]) for name, p in applied.graph.module.named_parameters() if "adaptor" in name and p.dim() > 1}
    assert sorted(shapes.values()) == ([(64, 64)] if kind == "1x1" else [(3, 64), (64, 3)])


def _given(graph: Graph, node: str, split: Split) -> Tensor:
    """What a node gives on all samples."""
    seen: list[Tensor] = []
    with torch.no_grad():
        observe(graph, [torch.from_numpy(array) for array in split.inputs], [node], lambda name, args, out: seen.append(out))
    return seen[0]


def test_a_fit_that_is_too_narrow_keeps_the_directions_that_give_most() -> None:
    torch.manual_seed(0)
    _, analysis = pruning.captured(Linear().eval(), (torch.randn(4, 5),))
    (block,) = analysis.blocks.values()
    x = torch.randn(1200, 64)
    branch = torch.stack([5 * x[..., 0], 2 * x[..., 1], 0.1 * x[..., 2]], -1) @ torch.linalg.qr(torch.randn(64, 3))[0].T
    for kind, error in (("1x1", 0.0), ("rank-3", 0.0), ("rank-2", 0.1 / 29.01**0.5), ("rank-1", (4.01 / 29.01) ** 0.5)):
        found = fitted(block, x.chunk(4), (x + branch).chunk(4), kind)
        assert pruning.relative_error(found(x), branch) == pytest.approx(error, abs=0.02)


def test_options_costs_and_plans_agree() -> None:
    """The narrower the map the less it costs and the more it loses; MACs by tables are those of the net that is made."""
    net, example = nets.resnet(blocks=2, width=16)
    graph, analysis = pruning.captured(net, example)
    split = pruning.calibration(graph, 96)
    order = orders("magnitude", graph, analysis, pruning.material(graph, 32), 0)
    options = sensitivities(graph, analysis, order, split, 8, samples=96, is_adapted=True)
    losses = {(option.subject, option.value): option.loss for option in options if option.technique == "block"}
    assert {value for _, value in losses} == {1, "1x1", "rank-16"}  # of 64 channels a quarter
    wide = [name for name, block in analysis.blocks.items() if block.channels >= 64]
    assert np.mean([losses[name, "1x1"] for name in analysis.blocks]) <= np.mean([losses[name, 1] for name in analysis.blocks])
    space = Space(analysis, options, Plan("onnxruntime:cpu"))
    costs = Costs(space, None)
    for kind in (None, "1x1", "rank-16"):
        plan = Plan("onnxruntime:cpu", blocks=(wide[0],), adaptors={wide[0]: kind} if kind else {})
        assert space.plan(space.assignment(plan)) == plan
        applied = apply(graph, analysis, plan, order)
        compensate(applied.graph, graph, applied.kept, split, 32)
        narrow_adaptors_(applied.graph, plan.adaptors, split)
        assert macs(analyse(applied.graph)) == costs.predict(space.assignment(plan))["macs"], kind
        shares = costs.shares(space.assignment(plan))
        assert {name for name, share in shares.items() if name.startswith(f"{wide[0]}.adaptor") and share} == (
            {f"{wide[0]}.adaptor.{n}" for n in range({"1x1": 1, "rank-16": 2}[kind])} if kind else set()
        )


def test_a_weighted_sum_leaves_no_adaptor() -> None:
    class Weighted(Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.entry(x))
            return self.head(torch.relu(torch.add(x, self.up(self.down(x)), alpha=0.5)))

    torch.manual_seed(0)
    _, analysis = pruning.captured(Weighted().eval(), (torch.randn(4, 5),))
    assert [block.adaptor for block in analysis.blocks.values()] == [""]


def test_the_stream_of_an_adaptor_narrows_with_it() -> None:
    torch.manual_seed(0)
    graph, analysis = pruning.captured(Linear().eval(), (torch.randn(4, 5),))
    (block,) = analysis.blocks
    split = pruning.calibration(graph, 128)
    order = {"entry": Order(np.arange(64.0)), "down": Order(np.arange(3.0))}
    plan = Plan("onnxruntime:cpu", widths={"entry": 48}, blocks=(block,), adaptors={block: "1x1"})
    applied = apply(graph, analysis, plan, order)
    compensate(applied.graph, graph, applied.kept, split)
    assert dict(applied.graph.module.named_parameters())[f"{block}.adaptor.weight"].shape == (48, 48)
    assert pruning.relative_error(pruning.outputs(applied.graph, split), pruning.outputs(graph, split)) < 0.5


@pytest.mark.parametrize(("name", "kind"), [("other", "1x1"), ("", "rank-0"), ("", "low")])
def test_an_adaptor_that_makes_no_sense_is_refused(name: str, kind: str) -> None:
    torch.manual_seed(0)
    graph, analysis = pruning.captured(Linear().eval(), (torch.randn(4, 5),))
    (block,) = analysis.blocks
    with pytest.raises(PlanError, match=r"must be bypassed and be a block|must be '1x1' or 'rank-R'"):
        apply(graph, analysis, Plan("onnxruntime:cpu", blocks=(block,), adaptors={name or block: kind}), {})


def test_a_run_that_leaves_an_adaptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 64, 3, padding=1)
            self.down, self.up = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)
            self.head = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.head(torch.relu(x + self.up(self.down(x))).mean((2, 3)))

    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.down.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0  # a linear map of each position
        net.up.weight.mul_(3.0)
    x, _ = small_jobs.images(200, seed=1)
    job = planish.Workload(
        model=net, example_inputs=(x[:1],), train=[(x[:150], None)], validation=[(x[150:], None)], metric="agreement", name="adapted"
    )
    budget = planish.Budget(macs="0.5x", drop=0.05)
    result = planish.optimize(job, "onnxruntime:cpu", budget, tmp_path / "net.planish", techniques=("prune", "adapt"), trials=4, threads=1)
    assert result.verdict == "met" and result.plan is not None
    assert list(result.plan.adaptors) == list(result.plan.blocks)
    with torch.no_grad():
        np.testing.assert_allclose(planish.load(tmp_path / "net.planish")(x.numpy()), result.module(x).numpy(), atol=1e-3)

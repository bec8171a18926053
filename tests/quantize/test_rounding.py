"""Roundings: the contract, brute force, a plain re-implementation, and what a program's weights become."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizing import VNNI, calibration, captured, declares, outputs, quantized
from torch import Tensor, nn

import families
import nets
from planish import registry
from planish.artifact.deployed import sqnr_db
from planish.errors import UnknownName
from planish.graph.fake_quantize import along_groups
from planish.graph.graph import Analysis, Graph
from planish.plan import Plan
from planish.quantize.apply import Quantized
from planish.quantize.arithmetic import Grid
from planish.quantize.contract import Layer, Outputs, Rounded
from planish.quantize.rounding.adaround import AdaRound
from planish.quantize.rounding.gptq import Gptq
from planish.quantize.subjects import unsupported
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.testing.rounding import check_rounding, layer

INFORMED = [name for name in registry.names("rounding") if name != "nearest"]


@pytest.mark.parametrize("name", registry.names("rounding"))
def test_keeps_the_contract(name: str) -> None:
    method = registry.get("rounding", name)
    check_rounding(functools.partial(method, steps=60) if name in ("adaround", "brecq") else method)  # it needs no more to be better


def test_gptq_in_the_order_of_the_columns_keeps_the_contract() -> None:
    check_rounding(functools.partial(Gptq, is_ordered=False))


def rounded(method: Any, given: Layer) -> Tensor:
    with torch.no_grad():
        found: Tensor = method.rounded([given], None, torch.Generator().manual_seed(0))[0].weight
    return found


def ratio(method: Any, given: Layer) -> float:
    """Its error as a share of nearest rounding's."""
    nearest = given.quantizer.rounded(given.weight)
    return float(given.errors(rounded(method, given)).sum() / given.errors(nearest).sum())


def plainly(given: Layer, order: Sequence[int], damping: float = 0.01) -> Tensor:
    """Optimal brain quantization column by column: after each the inverse Hessian loses its row by Gaussian elimination; no blocks, no Cholesky."""
    assert given.gram is not None
    gram = given.gram[0]
    inverse = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    quantizer, left, out = given.quantizer, given.weight.double().clone(), torch.empty_like(given.weight)
    scale = along_groups(quantizer.scale, quantizer.group, len(gram)).clone()
    zero = along_groups(quantizer.zero_point, quantizer.group, len(gram)).clone()
    for i in order:
        if given.regrid is not None and i % quantizer.group == 0:
            found = given.regrid(left[:, i : i + quantizer.group].float())
            scale[:, i : i + quantizer.group], zero[:, i : i + quantizer.group] = found.scale, found.zero_point
        steps = (left[:, i] / scale[:, i]).round().clamp(quantizer.grid.low - zero[:, i], quantizer.grid.high - zero[:, i])
        out[:, i] = (steps * scale[:, i]).float()
        error = (left[:, i] - steps * scale[:, i]) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


@pytest.mark.parametrize(("group", "is_fixed"), [(48, True), (16, True), (16, False), (32, False)])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_gptq_is_the_plain_algorithm_whatever_its_blocks(group: int, is_fixed: bool, block: int) -> None:
    given = layer(group=group, grid=Grid(0, 15), is_fixed=is_fixed)
    torch.testing.assert_close(rounded(Gptq(block=block, is_ordered=False), given), plainly(given, range(48)), rtol=1e-5, atol=1e-6)


def test_ordered_gptq_is_the_plain_algorithm_in_the_order_of_power() -> None:
    given = layer(group=16, grid=Grid(0, 15))
    assert given.gram is not None
    order = given.gram[0].diagonal().argsort(descending=True).tolist()
    torch.testing.assert_close(rounded(Gptq(block=16, is_ordered=True), given), plainly(given, order), rtol=1e-5, atol=1e-6)


def test_learned_rounding_is_near_the_best_of_all() -> None:
    """Eight weights a row: the best of all 256 ways up or down is at hand. AdaRound comes within a tenth of it; nearest loses half as much again."""
    total = dict.fromkeys(("best", "nearest", "gptq", "adaround"), 0.0)
    for seed in range(4):
        whole = layer(seed)
        assert whole.gram is not None
        quantizer = dataclasses.replace(whole.quantizer, group=8)
        given = Layer(whole.weight[:, 40:].contiguous(), quantizer, whole.gram[:, 40:, 40:].contiguous())
        floor = (given.weight / quantizer.scale).floor()
        ways = [quantizer.rounded((floor + torch.tensor(up)) * quantizer.scale) for up in itertools.product((0.0, 1.0), repeat=8)]
        total["best"] += float(torch.stack([given.errors(way) for way in ways]).amin(0).sum())
        for name in ("nearest", "gptq", "adaround"):
            total[name] += float(given.errors(rounded(registry.get("rounding", name)(), given)).sum())
    share = {name: error / total["best"] for name, error in total.items()}
    assert share["nearest"] > 1.4, share
    assert 1.0 - 1e-6 <= share["adaround"] < 1.1, share
    assert share["gptq"] < 0.5 * (1 + share["nearest"]), share


@pytest.mark.parametrize(("method", "most"), [(Gptq(is_ordered=False), 0.7), (Gptq(is_ordered=True), 0.25), (AdaRound(), 0.5)])
@pytest.mark.parametrize("group", [16, 48])
def test_the_layers_error_is_a_fraction_of_nearests(method: Any, most: float, group: int) -> None:
    assert ratio(method, layer(group=group, grid=Grid(0, 15))) < most


def whole(analysis: Analysis, graph: Graph, scheme: str) -> dict[str, str]:
    """Every operator that has a form in a scheme, but for embeddings."""
    by_name = {node.name: node for node in graph.module.graph.nodes}
    known = registry.get("scheme", scheme)
    found = {name: its for name, its in analysis.operators.items() if its.kind != "embedding"}
    return {name: scheme for name, its in found.items() if not unsupported(by_name[its.node], known)}


def done_by(rounding: str, graph: Graph, analysis: Analysis, scheme: str, **options: Any) -> Quantized:
    options = {"precisions": whole(analysis, graph, scheme), "bias_correction": False, **options}
    return quantized(graph, analysis, declares(), VNNI, rounding=rounding, **options)


class Grouped(nn.Module):
    """Plain, grouped and depthwise convolutions, a residual branch, a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Parameter(torch.randn(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.pointwise(self.depthwise(self.grouped(x).relu()))
        return x.mean((2, 3)) @ self.head


def grouped() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Grouped(), (torch.randn(2, 3, 12, 12),)


NETS = {"grouped": (grouped, "w4a8"), "gpt2": (families.gpt2, "int4-weights"), "bert": (nets.bert, "int8-dynamic")}


@pytest.mark.parametrize("net", NETS)
def test_weights_lie_on_their_grids_and_stay_there(net: str) -> None:
    """Rounding a rounded weight changes no bit, in float32, whatever the form."""
    make, scheme = NETS[net]
    graph, analysis = captured(*make())
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    done = done_by("gptq", graph, analysis, scheme)
    assert all(torch.equal(before[name], value) for name, value in graph.module.state_dict().items())
    module, seen = done.graph.module, 0
    left = {analysis.operators[name].node for name in done.nearest}
    for node in module.graph.nodes:
        value = node.args[0] if node.args else None
        if "fake_quantize" not in str(node.target) or not isinstance(value, torch.fx.Node):
            continue
        turned = value.args[0] if "aten.t" in str(value.target) else value
        readers = {reader.name for user in node.users for reader in (user, *user.users)}
        if not isinstance(turned, torch.fx.Node) or turned.op != "get_attr" or readers & left:
            continue
        weight = getattr_path(module, str(turned.target)).detach()
        matrix = weight if turned is value else weight.t()
        held = [getattr_path(module, str(a.target)) if isinstance(a, torch.fx.Node) else a for a in node.args[1:]]
        assert torch.equal(node.target(matrix, *held), matrix)
        seen += 1
    assert seen == len(done.operators) - len(done.nearest) - (net == "bert") * unweighted(analysis, done)
    assert net == "gpt2" or not done.nearest


def getattr_path(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def unweighted(analysis: Analysis, done: Quantized) -> int:
    return sum(analysis.operators[name].weight is None for name in done.operators)


class Recorder:
    """Rounds to nearest and keeps what it was given."""

    needs: frozenset[str] = frozenset({"moments"})
    seen: list[Layer] = []  # noqa: RUF012 - the registry makes the object, so the test finds it by its class

    def rounded(self, layers: Sequence[Layer], outputs: Outputs | None, generator: torch.Generator) -> list[Rounded]:
        Recorder.seen += layers
        return [Rounded(given.quantizer.rounded(given.weight), given.quantizer) for given in layers]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Layer]:
    monkeypatch.setattr(Recorder, "seen", [])
    monkeypatch.setattr(registry, "get", lambda kind, name, get=registry.get: Recorder if name == "recorder" else get(kind, name))
    return Recorder.seen


def second(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def test_moments_are_of_what_the_rounded_weights_before_give(recorded: list[Layer]) -> None:
    torch.manual_seed(0)
    graph, analysis = captured(nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 4)), (torch.randn(2, 20),))
    split = calibration(graph, 40)
    done_by("recorder", graph, analysis, "int4-weights", split=split)
    x = torch.from_numpy(split.inputs[0])
    first, after = recorded
    bias = graph.module.state_dict()["0.bias"]
    hidden = (x @ first.quantizer.rounded(first.weight).T + bias).relu()
    for given, inputs in ((first, x), (after, hidden)):
        assert given.gram is not None
        torch.testing.assert_close(given.gram[0], second(inputs), rtol=1e-4, atol=1e-5)
    assert after.gram is not None and not torch.allclose(after.gram[0], second((x @ first.weight.T + bias).relu()), rtol=1e-3)


def test_a_shared_weight_counts_the_inputs_of_all_its_readers(recorded: list[Layer]) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(16, 16, bias=False)
    graph, analysis = captured(nn.Sequential(shared, nn.Tanh(), shared), (torch.randn(2, 16),))
    split = calibration(graph, 40)
    done_by("recorder", graph, analysis, "int8-weights", split=split)
    (given,) = recorded
    x = torch.from_numpy(split.inputs[0])
    hidden = (x @ given.quantizer.rounded(given.weight).T).tanh()
    assert given.gram is not None
    torch.testing.assert_close(given.gram[0], second(torch.cat([x, hidden])), rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_has_a_system_for_each_group(recorded: list[Layer]) -> None:
    torch.manual_seed(0)
    graph, analysis = captured(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten()), (torch.rand(2, 4, 6, 6),))
    split = calibration(graph, 20)
    done_by("recorder", graph, analysis, "w4a8", split=split, observer="minmax")
    (given,) = recorded
    patches = nn.functional.unfold(torch.from_numpy(split.inputs[0]), 3, padding=1)
    rows = patches.transpose(1, 2).reshape(-1, 2, 18)
    assert given.gram is not None and given.gram.shape == (2, 18, 18)
    for system in range(2):
        torch.testing.assert_close(given.gram[system], second(rows[:, system]), rtol=0.02, atol=0.02)  # inputs are rounded to 256 steps


def residual() -> tuple[nn.Module, Any]:
    """Two branches whose inputs vary together, as those of real layers do."""
    torch.manual_seed(0)

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    few = nn.Linear(8, 32)
    return nn.Sequential(few, Branch(), Branch()), (torch.randn(2, 8),)


@pytest.mark.parametrize(("rounding", "most"), [("gptq", 0.5), ("adaround", 0.5), ("brecq", 0.5)])
def test_what_the_net_gives_is_nearer_to_the_original(rounding: str, most: float) -> None:
    """On samples that the method has not seen, at four bits."""
    graph, analysis = captured(*residual())
    branches = {name: scheme for name, scheme in whole(analysis, graph, "int4-weights").items() if name != "0"}
    split, unseen = calibration(graph, 128), calibration(graph, 128, seed=6)
    expected = outputs(graph, unseen)
    errors = {}
    for name in ("nearest", rounding):
        done = done_by(name, graph, analysis, "int4-weights", split=split, precisions=branches)
        errors[name] = float((outputs(done.graph, unseen) - expected).square().mean())
    assert errors[rounding] < most * errors["nearest"]


@pytest.mark.parametrize("rounding", INFORMED)
def test_one_sample_and_inputs_that_are_always_zero_do(rounding: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))
    with torch.no_grad():
        net[0].bias[3:7] = -100.0  # type: ignore[index, operator]
    graph, analysis = captured(net, (torch.randn(2, 24),))
    split = calibration(graph, 1)
    found = [outputs(done_by(rounding, graph, analysis, "int4-weights", split=split, seed=3).graph, split) for _ in range(2)]
    assert torch.equal(*found) and bool(torch.isfinite(found[0]).all())
    assert sqnr_db(outputs(graph, split).numpy(), found[0].numpy()) > 12.0


def test_what_is_rounded_to_nearest_all_the_same_is_named() -> None:
    """A table that is looked up in float and multiplied in int4 cannot be on the grid of one alone."""
    graph, analysis = captured(*families.gpt2())
    nearest, done = (done_by(name, graph, analysis, "int4-weights") for name in ("nearest", "gptq"))
    assert not nearest.nearest and list(done.nearest.values()) == ["its weight is read in another form too"]
    assert done.operators == nearest.operators
    with pytest.raises(UnknownName, match="gptq"):
        done_by("gptqq", graph, analysis, "int4-weights")


def test_the_exported_form_computes_what_the_module_does(tmp_path: Path) -> None:
    graph, analysis = captured(*families.gpt2())
    runtime = get_runtime("onnxruntime")
    done = done_by("gptq", graph, analysis, "int4-weights")
    session = runtime.open(runtime.export(done.graph, tmp_path), graph.signature, Target("onnxruntime"))
    split = calibration(graph, samples=3, seed=1)
    assert sqnr_db(outputs(done.graph, split).numpy(), session.run(list(split.inputs))[0]) > 55.0


def test_a_plan_without_a_rounding_keeps_its_name() -> None:
    assert Plan("onnxruntime:cpu", rounding="nearest").digest == Plan("onnxruntime:cpu").digest
    assert Plan("onnxruntime:cpu", rounding="gptq").digest != Plan("onnxruntime:cpu").digest

"""Scales that learn: the gradient is the paper's, a wrong scale comes back, and what was trained is what is exported and resumed."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantizing import VNNI, calibration, captured, declares, fake_quantizers, outputs, quantized, reads
from torch import Tensor, nn

import nets
from planish.data import Data, Split
from planish.distill.recover import RecoverReport, recover
from planish.distill.teacher import Teacher
from planish.graph.divergence import divergence
from planish.graph.fake_quantize import (
    LARGEST_BIAS,
    fake_quantize_per_channel_affine,
    fake_quantize_per_group,
    fake_quantize_per_tensor_affine,
)
from planish.graph.graph import Graph
from planish.plan import DEFAULT_SCHEMES, Recovery
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.bias import biases_kept, round_biases_
from planish.quantize.options import precision_options
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.train import loop
from planish.train.checkpoint import Checkpoint
from planish.train.scales import ScaleSteps, activation_bits, learning_scales, scales_of
from planish.workload import Workload

LOW, HIGH = -5, 9


def positions(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers from three steps below a grid to three above it; none is less than a step outside, where half a step counts as inside."""
    t = LOW - 3 + (HIGH - LOW + 6) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    t = torch.where((t > HIGH) & (t < HIGH + 1), t + 1, t)
    return torch.where((t < LOW) & (t > LOW - 1), t - 1, t)


def esser(t: Tensor) -> Tensor:
    """Equation 3 of the paper: the derivative of a rounded value by its scale, at `t` steps from zero."""
    inside = t.round() - t
    return torch.where(t <= LOW, float(LOW), torch.where(t >= HIGH, float(HIGH), inside))


@pytest.mark.parametrize("kind", ["tensor", "channels last", "channel 0", "channel 1", "groups", "groups and a rest"])
def test_the_gradient_is_that_of_the_paper(kind: str) -> None:
    zero, generator = 2, torch.Generator().manual_seed(1)
    rows, columns, group = 6, 44 if "rest" in kind else 48, 16
    if kind.startswith(("tensor", "channels")):
        t, scale = positions((3, 4, 5, 6)), torch.tensor(0.3)
        each, count = scale, t.numel()
    elif kind.startswith("channel "):
        axis = int(kind[-1])
        t = positions((rows, 7))
        scale = 0.1 + torch.rand(t.shape[axis], generator=generator)
        each, count = scale.view([-1, 1] if axis == 0 else [1, -1]), t.numel() // len(scale)
    else:
        t, count = positions((rows, columns)), group
        scale = 0.1 + torch.rand(rows, -(-columns // group), generator=generator)
        each = scale.repeat_interleave(group, 1)[:, :columns]
    x = (t * each).contiguous(memory_format=torch.channels_last if kind == "channels last" else torch.contiguous_format).requires_grad_()
    scale.requires_grad_()
    zeros = torch.full(scale.shape, zero, dtype=torch.int32)
    if kind.startswith(("tensor", "channels")):
        y = fake_quantize_per_tensor_affine(x, scale, zeros, LOW + zero, HIGH + zero)
    elif kind.startswith("channel "):
        y = fake_quantize_per_channel_affine(x, scale, zeros, int(kind[-1]), LOW + zero, HIGH + zero)
    else:
        y = fake_quantize_per_group(x, scale, zeros, group, LOW + zero, HIGH + zero)
    torch.testing.assert_close(y, t.round().clamp(LOW, HIGH) * each)
    upstream = torch.randn(y.shape, generator=generator)
    y.backward(upstream)
    terms = (upstream * esser(t)).double()
    if kind.startswith(("tensor", "channels")):
        expected = terms.sum()
    elif kind.startswith("channel "):
        expected = terms.sum(1 - int(kind[-1]))
    else:
        expected = torch.stack([part.sum(1) for part in terms.split(group, 1)], 1)
    assert scale.grad is not None and x.grad is not None
    torch.testing.assert_close(scale.grad.double(), expected / math.sqrt(count * HIGH), rtol=1e-4, atol=1e-5)
    assert torch.equal(x.grad, upstream * ((t >= LOW) & (t <= HIGH)))


def test_where_all_is_clipped_the_gradient_is_the_slope() -> None:
    """There the rounded values are a smooth function of the scale, and finite differences know nothing of the paper."""
    x = torch.tensor([9.0, -7.0, 30.0, -6.5])
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    zeros = torch.zeros((), dtype=torch.int32)

    def value(scale: Tensor) -> Tensor:
        return (fake_quantize_per_tensor_affine(x, scale, zeros, LOW, HIGH) * weight).sum()

    scale = torch.tensor(0.25, requires_grad=True)
    value(scale).backward()
    slope = (value(torch.tensor(0.26)) - value(torch.tensor(0.24))) / 0.02
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(slope) / math.sqrt(len(x) * HIGH), rel=1e-4)


def test_channels_are_rounded_as_torch_rounds_them() -> None:
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    scale, zeros = x.abs().amax((1, 2, 3)) / 5, torch.zeros(8, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -7, 7)
    assert torch.equal(fake_quantize_per_channel_affine(x, scale, zeros, 0, -7, 7), expected)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_scale_that_is_wrong_by_a_factor_of_three_comes_to_the_best(factor: float) -> None:
    """Of rounding error alone, whose least a search over scales finds."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros((), dtype=torch.int32)

    def error(scale: Tensor) -> Tensor:
        return (fake_quantize_per_tensor_affine(x, scale, zeros, -7, 7) - x).square().mean()

    tried = torch.linspace(0.05, 1.5, 500)
    best = float(tried[torch.stack([error(scale) for scale in tried]).argmin()])
    scale = nn.Parameter(torch.tensor(best * factor))
    optimizer = ScaleSteps([scale], lr=0.02)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 200)
        scale.grad = None
        error(scale).backward()
        optimizer.step()
    assert float(error(scale.detach())) <= 1.1 * float(error(torch.tensor(best)))
    assert float(scale.detach()) == pytest.approx(best, rel=0.2)


def test_scales_stay_positive_whatever_the_gradient() -> None:
    scale, other = nn.Parameter(torch.tensor([1e-3, 2.0])), nn.Parameter(torch.tensor(0.5))
    optimizer = ScaleSteps([scale, other], lr=0.5)
    for size in (1e9, 1e-9, 1e9, 1e3):
        scale.grad = torch.tensor([size, -size])
        other.grad = None
        optimizer.step()
    assert 0 < float(scale.detach()[0]) < 1e-3 and float(scale.detach()[1]) > 2.0
    assert float(other.detach()) == 0.5  # nobody read it


def test_the_gain_of_a_channel_is_its_scale() -> None:
    """Why batch norm may be folded before training: a gain behind a rounded weight is a weight and a scale that are larger by it."""
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    scale, zeros = weight.abs().amax((1, 2, 3)) / 7, torch.zeros(8, dtype=torch.int32)
    gain = 2.0 ** torch.arange(-4, 4)  # exact in floating point
    behind = fake_quantize_per_channel_affine(weight, scale, zeros, 0, -7, 7) * gain.view(-1, 1, 1, 1)
    assert torch.equal(fake_quantize_per_channel_affine(weight * gain.view(-1, 1, 1, 1), scale * gain, zeros, 0, -7, 7), behind)


X = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Trainable:
    """A small ResNet in W4A4 but for its ends, and what recovers it."""

    def __init__(self, folder: Path, runtime: str = "onnxruntime") -> None:
        torch.manual_seed(0)
        model, example = nets.resnet(1, "A")
        net = nets.randomise_norms(model).eval()
        with torch.no_grad():
            head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
            head.weight.mul_(20)  # a teacher that is sure, as a trained one is
            head.bias.sub_(net(X).mean(0))
        self.original, self.analysis = captured(net, example)
        self.job = Workload(model=net, example_inputs=example, train=X, metric="agreement")
        self.data: Data = self.job.materialize(folder)
        assert self.data.train is not None
        self.teacher = Teacher(self.original, self.data.train, folder)
        self.runtime = runtime

    @property
    def split(self) -> Split:
        assert self.data.train is not None
        return self.data.train

    def quantized(self) -> Graph:
        names = [name for name, found in self.analysis.operators.items() if found.kind in ("conv", "linear")]
        precisions = {name: "int8" if name in (names[0], names[-1]) else "w4a4" for name in names}
        done = quantized(self.original, self.analysis, get_runtime(self.runtime), VNNI, precisions=precisions, split=self.split)
        assert not done.skipped
        return done.graph

    def train(self, graph: Graph, samples: int = 512, rate: float = 0.03, **more: Any) -> RecoverReport:
        return recover(graph, self.teacher, self.job, self.data, Recovery(samples, rate, batch_size=32), **more)


def state(graph: Graph) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in graph.module.state_dict().items()}


def test_scales_are_parameters_while_a_net_trains_and_buffers_again(tmp_path: Path) -> None:
    setting = Trainable(tmp_path)
    graph = setting.quantized()
    buffers, code = {name for name, _ in graph.module.named_buffers()}, graph.module.code
    kept = outputs(graph, setting.split)
    with learning_scales(graph):
        names = {name for name, _ in graph.module.named_parameters()}
        learned = {name for name in buffers if name.endswith("_scale")}
        assert learned and learned <= names and len(scales_of(graph)) == len(learned)
        assert torch.equal(outputs(graph, setting.split), kept)
    assert {name for name, _ in graph.module.named_buffers()} == buffers and not scales_of(graph)
    assert graph.module.code == code and torch.equal(outputs(graph, setting.split), kept)


def test_recovery_corrects_scales_that_are_wrong_by_a_factor_of_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Trainable(tmp_path)
    wrong = setting.quantized()
    spoiled = [name for name, _ in wrong.module.named_buffers() if name.endswith("4_bits_scale")]
    assert len(spoiled) == 6
    right = {name: wrong.module.get_buffer(name).clone() for name in spoiled}
    for name in spoiled:
        wrong.module.get_buffer(name).mul_(3.0)
    fixed = wrong.copy()
    learned = setting.train(wrong, samples=4096, rate=0.1)
    for name in spoiled:
        assert 0.5 < float(wrong.module.get_buffer(name) / right[name]) < 2.0, name
    monkeypatch.setattr(ScaleSteps, "step", lambda self, closure=None: None)
    assert learned.fit is not None and learned.fit.kept != "before"
    assert learned.loss_after < 0.7 * setting.train(fixed, samples=4096, rate=0.1).loss_after


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
def test_what_was_trained_is_what_is_exported(runtime: str, tmp_path: Path) -> None:
    there = get_runtime(runtime, require=False)
    if there.missing():
        pytest.skip(f"{runtime} is not installed")
    setting = Trainable(tmp_path, runtime)
    graph = setting.quantized()
    before = state(graph)
    setting.train(graph, keep_last=True)
    after = state(graph)
    assert before.keys() == after.keys()
    moved = [name for name in after if name.endswith("_scale") and not torch.equal(before[name], after[name])]
    assert len(moved) == sum(name.endswith("_scale") for name in after)
    assert all(bool((after[name] > 0).all()) for name in moved)
    assert all(torch.equal(before[name], after[name]) for name in after if name.endswith("zero_point"))
    path = there.export(graph, tmp_path)
    session = there.open(path, graph.signature, Target(runtime))
    split = calibration(graph, samples=8, seed=3)
    found = torch.from_numpy(session.run(list(split.inputs))[0])
    proof = session.proof()
    session.close()
    # the same to float32's last bits: 115 and 118 dB, in a net whose outputs have their mean taken off
    assert sqnr_db(outputs(graph, split), found) > 100.0
    assert proof.int8_kernels >= (4 if runtime == "onnxruntime" else 8), proof


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_convolutions_of_four_bits_are_exported_exactly(scheme: str, runtime: str, tmp_path: Path) -> None:
    there = get_runtime(runtime, require=False)
    if there.missing():
        pytest.skip(f"{runtime} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())), nn.Conv2d(8, 4, 1))
    graph, analysis = captured(model, (torch.randn(2, 8, 12, 12),))
    done = quantized(graph, analysis, there, VNNI, precisions={"0": "int8", "2": scheme, "4": scheme, "6": scheme})
    assert not done.skipped
    session = there.open(there.export(done.graph, tmp_path), graph.signature, Target(runtime))
    split = calibration(graph, samples=8, seed=3)
    found = torch.from_numpy(session.run(list(split.inputs))[0])
    session.close()
    # sums of integers are exact, and biases lie on their grid: what is left is float32's rounding, 135 to 140 dB
    assert sqnr_db(outputs(done.graph, split), found) > 100.0


def test_a_clamp_stands_before_what_has_four_bits(tmp_path: Path) -> None:
    """ONNX's QuantizeLinear saturates at 255 alone. The plain form computes what the module does, value for value."""
    import onnxruntime

    setting = Trainable(tmp_path)
    graph = setting.quantized()
    path = get_runtime("onnxruntime").export(graph, tmp_path)
    kinds = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["Clip"] == sum(node.args[-1] == 15 for node in fake_quantizers(graph)) == 6
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    split = calibration(graph, samples=3, seed=9)
    (found,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(split.inputs[0])})
    # the same float operations on the same grids, in another order: float32's 24 bits are 144 dB
    assert sqnr_db(outputs(graph, split), torch.from_numpy(found)) > 100.0


def test_a_resumed_training_has_the_scales_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Trainable(tmp_path)
    checkpoint = Checkpoint(tmp_path / "phase.safetensors")
    first, again = setting.quantized(), setting.quantized()
    setting.train(first, checkpoint=checkpoint)
    report = setting.train(again, checkpoint=checkpoint)
    assert report.samples == 512
    expected, found = state(first), state(again)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    monkeypatch.setattr(loop, "_CHECKPOINT_S", 0.0)
    monkeypatch.setattr(loop, "_SNAPSHOT_STEPS", 4)
    unfinished = Checkpoint(tmp_path / "unfinished.safetensors")
    stopped = setting.quantized()
    start = state(stopped)

    def killed(done: int, total: int) -> None:
        if done >= 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setting.train(stopped, progress=killed, checkpoint=unfinished)
    resumed = setting.quantized()
    report = setting.train(resumed, should_stop=lambda: True, checkpoint=unfinished, keep_last=True)
    assert report.samples == 256
    round_biases_(stopped.module)
    expected, found = state(stopped), state(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(found["relu_1_4_bits_scale"], start["relu_1_4_bits_scale"])


def test_the_rate_follows_the_grid(tmp_path: Path) -> None:
    setting = Trainable(tmp_path)
    assert activation_bits(setting.quantized()) == 4 and activation_bits(setting.original) == 8


def test_scales_of_weights_stay_large_enough_for_their_biases(tmp_path: Path) -> None:
    """A bias is int32 in units of both scales: in a channel with tiny weights nothing else holds the scale up."""
    graph = Trainable(tmp_path).quantized()
    with learning_scales(graph):
        found = dict(graph.module.named_parameters())
        bias, weight, read = (found[name] for name in ("layer1.0.conv2.bias", "layer1_0_conv2_weight_scale", "relu_1_4_bits_scale"))
        with torch.no_grad():
            before = weight.detach().clone()
            weight[3] = 1e-20
            biases_kept(graph.module)(0.1, 0.5)
    assert float(bias.detach()[3].abs() / (read * weight).detach()[3]) == pytest.approx(LARGEST_BIAS, rel=1e-5)
    assert torch.equal(weight[:3], before[:3])


class Forked(nn.Module):
    """A value that a 4-bit operator reads through a pool, an int8 operator as it is, and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.four = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.eight, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        small = torch.max_pool2d(x, 2)
        return self.last(torch.relu(self.eight(x) + x)).mean((2, 3)) + self.four(small).mean((2, 3))[:, :4]


def test_who_wants_fewer_bits_reads_a_narrower_value_behind_the_shared_one() -> None:
    torch.manual_seed(0)
    graph, analysis = captured(Forked(), (torch.randn(2, 3, 8, 8),))
    precisions = {"first": "int8", "four": "w4a4", "eight": "int8", "last": "w4a4"}
    done = quantized(graph, analysis, declares(), VNNI, precisions=precisions)
    narrow = [node for node in fake_quantizers(done.graph) if node.args[-1] == 15]
    assert sorted(str(node.args[1]) for node in narrow) == ["relu_1_4_bits_scale", "relu_4_bits_scale"]
    pooled, summed = sorted(narrow, key=lambda node: node.name)
    assert "fake_quantize" in str(pooled.args[0]) and reads(done.graph, pooled.name) == ["max_pool2d"]
    assert str(summed.args[0]) == "relu_1" and reads(done.graph, summed.name) == ["conv2d_2"]
    split = calibration(graph)
    assert sqnr_db(outputs(graph, split), outputs(done.graph, split)) > 12.0


def test_the_loss_of_four_bits_alone_is_foreseen() -> None:
    graph, analysis = captured(*nets.resnet(1, "A"))
    split = calibration(graph, samples=48)
    (option,) = (o for o in precision_options(graph, analysis, declares(), VNNI, split, ("w4a4",)) if o.subject == "layer2.0.conv2")
    alone = quantized(graph, analysis, declares(), VNNI, precisions={option.subject: "w4a4"}, split=split, bias_correction=False)
    original = outputs(graph, split)
    expected = float(divergence([original]).per_sample([outputs(alone.graph, split)], [original]).double().mean())
    assert option.value == "w4a4" and option.loss == pytest.approx(expected, rel=0.05)


def test_four_bits_are_offered_only_where_they_are_asked_for() -> None:
    assert "w4a4" not in DEFAULT_SCHEMES and "w4a8" not in DEFAULT_SCHEMES

"""Recovery brings a damaged net back, label-free or not, quantized or not, and never makes it worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from nets import randomise_norms
from planish.data import Data
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Graph
from planish.graph.modes import short_name
from planish.plan import Recovery
from planish.workload import Workload

G = torch.Generator().manual_seed(0)
X = torch.randn(512, 3, 8, 8, generator=G)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def setting(tmp_path: Path, labels: bool = True, **changes: Any) -> tuple[Graph, Workload, Data, Teacher]:
    torch.manual_seed(0)
    net = randomise_norms(Net()).eval()
    with torch.no_grad():
        net.get_parameter("fc.weight").mul_(40)  # a teacher that is sure, as a trained one is
        net.get_parameter("fc.bias").sub_(net(X).mean(0))
        y = net(X).argmax(1)
    train = (X, y) if labels else X
    metric = "accuracy" if labels else "agreement"
    job = Workload(**{"model": net, "example_inputs": (X[:2],), "train": train, "metric": metric, **changes})
    data = job.materialize(tmp_path)
    graph = capture(job.model_module(), job.example_inputs)
    assert data.train is not None
    return graph, job, data, Teacher(graph, data.train, tmp_path)


def damaged(graph: Graph, amount: float = 0.3) -> Graph:
    """A copy whose weights are noisy: what pruning leaves, as far as recovery is concerned."""
    student = graph.copy()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.module.parameters():
            if parameter.dim() > 1:
                parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("labels", [True, False])
def test_a_damaged_net_comes_back(labels: bool, tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path, labels)
    student = damaged(graph)
    original = [t.clone() for t in graph.module.state_dict().values()]
    report = recover(student, teacher, job, data, Recovery(samples=4096, batch_size=64))
    assert report.norms == 2 and report.fit is not None and report.samples >= 4096 and not report.diverged
    assert report.loss_after < 0.3 * report.loss_before
    assert all(torch.equal(a, b) for a, b in zip(original, graph.module.state_dict().values(), strict=True))
    # nine epochs over the split ask for each output once; validation is the rest
    assert data.train is not None and teacher.computed <= X.shape[0]


def test_zero_samples_recalibrate_only(tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path)
    student = damaged(graph)
    weights = [p.clone() for p in student.module.parameters()]
    with torch.no_grad():
        for name, buffer in student.module.named_buffers():
            if "running" in name:
                buffer.mul_(5)
    report = recover(student, teacher, job, data, Recovery(samples=0))
    assert report.fit is None and report.norms == 2 and report.loss_after == report.loss_before
    assert all(torch.equal(a, b) for a, b in zip(weights, student.module.parameters(), strict=True))


def test_the_original_itself_is_not_made_worse(tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path)
    report = recover(graph.copy(), teacher, job, data, Recovery(samples=512, learning_rate=0.5))
    assert report.loss_after <= report.loss_before
    control = recover(graph.copy(), teacher, job, data, Recovery(samples=512), is_control=True)
    assert teacher.hints == ()
    assert control.fit is not None and control.fit.kept != "before"


def test_same_seed_same_weights(tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path)
    found = []
    for _ in range(2):
        student = damaged(graph)
        recover(student, teacher, job, data, Recovery(samples=512), seed=3)
        found.append(torch.cat([p.detach().flatten() for p in student.module.parameters()]))
    assert torch.equal(*found)


def test_augmented_batches_are_taught_as_they_are(tmp_path: Path) -> None:
    calls = []

    def flip(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return images.flip(3) if torch.rand(()) < 0.5 else images

    graph, job, data, teacher = setting(tmp_path, augment=flip)
    report = recover(damaged(graph), teacher, job, data, Recovery(samples=2048))
    assert calls and report.loss_after < 0.5 * report.loss_before
    assert teacher.computed >= report.samples and not (tmp_path / "teacher.output0.npy").exists()


def test_the_users_loss_is_added_in_the_models_structure(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((outputs.shape, targets.dtype))
        return outputs.square().mean() * 100

    graph, job, data, teacher = setting(tmp_path, loss=loss)
    student = damaged(graph, 0.05)
    recover(student, teacher, job, data, Recovery(samples=512, batch_size=64))
    assert {dtype for _, dtype in seen} == {torch.int64} and (64, 4) in {tuple(shape) for shape, _ in seen}


def test_without_train_calibration_teaches(tmp_path: Path) -> None:
    graph, job, data, _ = setting(tmp_path, labels=False)
    bare = Data(None, None, None, data.calibration, tmp_path)
    report = recover(damaged(graph), Teacher(graph, bare.calibration, tmp_path), job, bare, Recovery(samples=2048))
    assert report.loss_after < 0.5 * report.loss_before


def quantized(graph: Graph, levels: int = 7) -> Graph:
    """Batch norm folded, and every weight and activation of a convolution fake-quantized, as the quantize room does."""
    folded = fold_batch_norm(graph)
    module = folded.module
    for node in list(module.graph.nodes):
        if short_name(node) != "conv2d":
            continue
        weight_node, source = node.args[1], node.args[0]
        weight = module.get_parameter(str(weight_node.target))
        scale = weight.detach().abs().amax((1, 2, 3)) / levels
        module.register_buffer(f"{node.name}_scale", scale)
        module.register_buffer(f"{node.name}_zero", torch.zeros(len(scale), dtype=torch.int32))
        with module.graph.inserting_before(node):
            arguments = (
                weight_node,
                module.graph.get_attr(f"{node.name}_scale"),
                module.graph.get_attr(f"{node.name}_zero"),
                0,
                -levels,
                levels,
            )
            rounded = module.graph.call_function(torch.ops.aten.fake_quantize_per_channel_affine.default, arguments)
            low = -2.5 if source.op == "placeholder" else 0.0
            step = 5.0 / 255
            seen = module.graph.call_function(
                torch.ops.aten.fake_quantize_per_tensor_affine.default, (source, step, round(-low / step), 0, 255)
            )
        node.args = (seen, rounded, *node.args[2:])
    clean = fx.GraphModule(module, module.graph)
    folded.module = clean
    return folded


def test_fake_quantized_nets_train_straight_through(tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path, labels=False)
    student = quantized(graph, levels=3)
    report = recover(student, teacher, job, data, Recovery(samples=4096))
    assert report.norms == 0 and report.fit is not None and not report.fit.arithmetic.bf16
    assert report.fit.kept != "before" and report.loss_after < 0.7 * report.loss_before


def test_a_net_that_gives_nan_ends_as_diverged(tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path)
    student = damaged(graph)
    with torch.no_grad():
        student.module.get_parameter("fc.bias")[0] = np.nan
    report = recover(student, teacher, job, data, Recovery(samples=512))
    assert report.diverged and report.fit is not None and report.fit.steps == 0


def test_the_users_loss_waits_for_labels_and_odd_labels_teach_nothing(tmp_path: Path) -> None:
    """Calibration inputs have no targets; integers that are no class of the output (counts, -1) are left out of the loss."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    graph, job, data, _ = setting(tmp_path, labels=False, loss=loss)
    bare = Data(None, None, None, data.calibration, tmp_path)
    recover(damaged(graph), Teacher(graph, bare.calibration, tmp_path), job, bare, Recovery(samples=256))

    def error(outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.mean(1) - targets).abs().mean())

    counts = (X, torch.arange(len(X)))
    graph, job, data, teacher = setting(tmp_path / "counts", train=counts, metric=error)
    report = recover(damaged(graph), teacher, job, data, Recovery(samples=2048))
    assert report.loss_after < 0.5 * report.loss_before


@pytest.mark.parametrize("is_quantized", [False, True])
def test_zeros_of_masked_weights_stay_and_the_others_learn(is_quantized: bool, tmp_path: Path) -> None:
    graph, job, data, teacher = setting(tmp_path)
    student = graph.copy()
    names = ("conv2.weight", "fc.weight")
    zeros = {}
    with torch.no_grad():
        for name in names:
            weight = student.module.get_parameter(name)
            zeros[name] = weight.abs() < weight.abs().median()
            weight.masked_fill_(zeros[name], 0.0)
    if is_quantized:
        student = quantized(student)
    before = {name: student.module.get_parameter(name).detach().clone() for name in names}
    report = recover(student, teacher, job, data, Recovery(samples=2048, learning_rate=0.1), masked=names)
    assert report.loss_after < report.loss_before and report.fit is not None and report.fit.kept != "before"
    for name in names:
        weight = student.module.get_parameter(name).detach()
        assert bool((weight[zeros[name]] == 0).all()), name
        assert bool((weight[~zeros[name]] != before[name][~zeros[name]]).any()), name

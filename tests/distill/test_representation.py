"""What the last operator reads is found, taught where teacher and student agree on its shape, and trains the graph itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nets import ResNet, images, randomise_norms
from planish.data import Split
from planish.distill.recover import recover
from planish.distill.representation import with_representation
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.plan import Plan, Recovery
from planish.prune.apply import apply
from planish.prune.saliency.magnitude import Magnitude
from planish.quantize.apply import quantize
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.workload import Workload

X, Y = images(64, 8)[0], torch.arange(64) % 10


class Embedding(nn.Module):
    """Ends in a sum of two branches: nothing alone makes its output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Direct(nn.Module):
    """Its only operator reads the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


def test_it_is_what_the_last_linear_map_reads() -> None:
    net = randomise_norms(ResNet(1, 8)).eval()
    graph = capture(net, (X[:2],))
    extended = with_representation(graph)
    assert extended is not None
    with torch.no_grad():
        out, read = extended.module(X)
        torch.testing.assert_close(
            nn.functional.linear(read, graph.module.get_parameter("fc.weight"), graph.module.get_parameter("fc.bias")), out
        )
    assert len(graph.module(X)) == 1, "the graph itself is as it was"
    assert all(a is b for a, b in zip(extended.module.parameters(), graph.module.parameters(), strict=True))
    assert all(a is b for a, b in zip(extended.module.buffers(), graph.module.buffers(), strict=True))


@pytest.mark.parametrize("net", [Embedding(), Direct()], ids=lambda net: type(net).__name__)
def test_there_is_none(net: nn.Module) -> None:
    assert with_representation(capture(net.eval(), (torch.randn(2, 6),))) is None


@pytest.mark.parametrize("narrow", [False, True], ids=["same width", "the representation is narrower"])
def test_recovery_follows_it_where_the_shapes_agree(narrow: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomise_norms(ResNet(1, 8)).eval()
    job = Workload(model=net, example_inputs=(X[:2],), train=(X, Y), metric="accuracy")
    data = job.materialize(tmp_path)
    graph = capture(job.model_module(), job.example_inputs)
    analysis = analyse(graph)
    teacher = Teacher(graph, data.train, tmp_path)
    last = max(analysis.groups, key=lambda name: analysis.groups[name].units) if narrow else next(iter(analysis.groups))
    widths = {last: analysis.groups[last].units // 2}
    scores = Magnitude().scores(graph, analysis, data.calibration, 0)
    student = apply(graph, analysis, Plan("onnxruntime:cpu", widths=widths), scores).graph
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    report = recover(student, teacher, job, data, Recovery(samples=256, batch_size=32))
    assert report.loss_after <= report.loss_before
    after = student.module.state_dict()
    assert list(after) == list(before) and any(not torch.equal(after[name], before[name]) for name in before)
    assert len(student.module(X)) == 1


def test_an_int8_student_follows_it_too() -> None:
    """With fake quantization the last map reads a quantized value: that is what follows the teacher's."""
    net = randomise_norms(ResNet(1, 8)).eval()
    graph = capture(net, (X[:2],))
    runtime, split = get_runtime("onnxruntime"), Split([X.numpy()], None, len(X))
    analysis = analyse(graph)
    done = quantize(graph, analysis, {"fc": "int8"}, runtime, Target("onnxruntime"), split)
    extended = with_representation(done.graph)
    assert extended is not None
    with torch.no_grad():
        *_, read = extended.module(X)
        *_, wanted = with_representation(graph).module(X)
    assert read.shape == wanted.shape
    torch.testing.assert_close(read, wanted, atol=0.02 * wanted.abs().max().item(), rtol=0)


def test_what_is_too_large_to_keep_is_left_out(tmp_path: Path) -> None:
    """The teacher's own outputs are cached even where a representation would not fit beside them."""
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), (X[:2],))
    split = Split([X.numpy()], None, len(X))
    assert Teacher(graph, split, tmp_path, largest_bytes=64 * 4 * len(X) * 4).has_representation
    teacher = Teacher(graph, split, tmp_path, largest_bytes=16 * 4 * len(X))
    assert not teacher.has_representation
    teacher.outputs(np.arange(4), [X[:4]])
    teacher.outputs(np.arange(4), [X[:4]])
    assert teacher.computed == 4

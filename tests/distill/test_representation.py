"""What the last operator reads is found, taught where teacher and student agree on its shape, and trains the graph itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nets import ResNet, images, randomise_norms
from planish.distill.recover import recover
from planish.distill.representation import with_representation
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.plan import Plan, Recovery
from planish.prune.apply import apply
from planish.prune.saliency.magnitude import Magnitude
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

"""Hints are values that teacher and student share; they are taught where their shapes agree, and train the graph itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nets import ResNet, images, randomise_norms
from planish.data import Split
from planish.distill.hints import LARGEST, shared_hints, with_hints
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.modes import set_mode
from planish.plan import Plan, Recovery
from planish.prune.apply import apply
from planish.prune.contract import Material
from planish.prune.order import orders
from planish.quantize.apply import quantize
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.train.norms import recalibrate_batch_norm
from planish.workload import Workload

X, Y = images(64, 8)[0], torch.arange(64) % 10
ONE = [X[:1]]


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


def reader_of(graph, weight: str) -> str:
    (node,) = graph.module.graph.find_nodes(op="get_attr", target=weight)
    return next(iter(node.users)).name


def stream_of(analysis, weight: str) -> str:
    """The group whose units an operator's weight contracts."""
    return next(name for name, group in analysis.groups.items() if group.roles.get((weight, 1)) == "in")


def smaller(graph, widths=(), blocks=()):
    analysis = analyse(graph)
    order = orders("magnitude", graph, analysis, Material(Split([X.numpy()], None, len(X))), 0)
    return apply(graph, analysis, Plan("onnxruntime:cpu", widths=dict(widths), blocks=tuple(blocks)), order).graph


def test_the_last_value_of_each_resolution_is_a_hint_and_the_deepest_is_what_the_last_map_reads() -> None:
    graph = capture(randomise_norms(ResNet(2, 8)).eval(), (X[:2],))
    hints = shared_hints(graph, graph, ONE)
    extended = with_hints(graph, hints)
    with torch.no_grad():
        out, *values = extended.module(X)
        torch.testing.assert_close(
            nn.functional.linear(values[-1], graph.module.get_parameter("fc.weight"), graph.module.get_parameter("fc.bias")), out
        )
    sides = [value.shape[-1] for value in values[:-1]]
    assert sides == sorted(set(sides), reverse=True) and len(sides) == 3, "one for each stage, none twice"
    assert [hint.numbers for hint in hints] == [value[0].numel() for value in values]
    assert len(graph.module(X)) == 1, "the graph itself is as it was"
    assert all(a is b for a, b in zip(extended.module.parameters(), graph.module.parameters(), strict=True))
    assert all(a is b for a, b in zip(extended.module.buffers(), graph.module.buffers(), strict=True))


def test_a_student_without_the_last_block_of_a_stage_shares_what_the_next_stage_reads() -> None:
    graph = capture(randomise_norms(ResNet(2, 8)).eval(), (X[:2],))
    block = next(name for name in analyse(graph).blocks)
    student = smaller(graph, blocks=[block])
    hints = shared_hints(graph, student, ONE)
    assert [hint.numbers for hint in hints] == [hint.numbers for hint in shared_hints(graph, graph, ONE)]
    taught, shown = with_hints(student, hints).module(X[:3]), with_hints(graph, hints).module(X[:3])
    assert [value.shape for value in taught] == [value.shape for value in shown]


def test_what_was_narrowed_is_no_hint() -> None:
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), (X[:2],))
    analysis = analyse(graph)
    last = stream_of(analysis, "fc.weight")
    student = smaller(graph, widths={last: analysis.groups[last].units // 2})
    readers = {hint.reader for hint in shared_hints(graph, student, ONE)}
    assert reader_of(graph, "fc.weight") not in readers and 0 < len(readers) < len(shared_hints(graph, graph, ONE))


def test_a_large_image_is_averaged_over_its_positions_until_it_is_small_enough() -> None:
    large = images(2, 64)[0]
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), (large,))
    hints = shared_hints(graph, graph, [large[:1]])
    assert hints[0].pooled and not hints[-1].pooled and all(hint.numbers <= LARGEST for hint in hints)
    plain = [type(hint)(hint.reader, (), 0) for hint in hints]
    with torch.no_grad():
        averaged, whole = with_hints(graph, hints).module(large)[1], with_hints(graph, plain).module(large)[1]
    torch.testing.assert_close(averaged, nn.functional.adaptive_avg_pool2d(whole, hints[0].pooled))


@pytest.mark.parametrize("net", [Embedding(), Direct()], ids=lambda net: type(net).__name__)
def test_there_is_none(net: nn.Module) -> None:
    graph = capture(net.eval(), (torch.randn(2, 6),))
    assert shared_hints(graph, graph, [torch.randn(1, 6)]) == () and with_hints(graph, ()) is graph


def test_looking_for_hints_leaves_running_statistics_alone() -> None:
    graph = capture(randomise_norms(ResNet(1, 8)), (X[:2],))
    set_mode(graph, True)
    before = [buffer.clone() for buffer in graph.module.buffers()]
    assert shared_hints(graph, graph, ONE)
    assert graph.module.training and all(torch.equal(a, b) for a, b in zip(before, graph.module.buffers(), strict=True))


def distances(teacher, student, hints) -> list[float]:
    with torch.no_grad():
        shown, taught = with_hints(teacher, hints).module(X)[1:], with_hints(student, hints).module(X)[1:]
    return [((a - b).square().mean() / a.var()).item() for a, b in zip(shown, taught, strict=True)]


class Mixer(nn.Module):
    """A linear map along the last axis of `[n, positions, features]`, after one that makes it: what a Transformer's layer reads."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, features), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_a_sequence_counts_as_long_as_it_is_trained_on() -> None:
    graph = capture(Mixer(32).eval(), (torch.randn(2, 10, 6),))
    assert [hint.numbers for hint in shared_hints(graph, graph, [torch.randn(1, 10, 6)])] == [320]
    assert shared_hints(graph, graph, [torch.randn(1, 200, 6)]) == (), "6400 numbers: too many, and features are not averaged"


@pytest.mark.parametrize("narrow", [False, True], ids=["same width", "the last values are narrower"])
def test_recovery_follows_them_where_the_shapes_agree(narrow: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ResNet(1, 8).eval()
    job = Workload(model=net, example_inputs=(X[:2],), train=[(X, None)], metric="agreement")
    data = job.materialize(tmp_path)
    graph = capture(job.model_module(), job.example_inputs)
    recalibrate_batch_norm(graph, data.train)
    analysis = analyse(graph)
    teacher = Teacher(graph, data.train, tmp_path)
    last = stream_of(analysis, "fc.weight") if narrow else next(iter(analysis.groups))
    widths = {last: analysis.groups[last].units // 2}
    order = orders("magnitude", graph, analysis, Material(data.calibration), 0)
    student = apply(graph, analysis, Plan("onnxruntime:cpu", widths=widths), order).graph
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    hints = teacher.show(student)
    recalibrate_batch_norm(student, data.train)
    far = distances(graph, student, hints)
    recover(student, teacher, job, data, Recovery(samples=1024, batch_size=32))
    near = distances(graph, student, hints)
    assert hints and all(b < 0.8 * a for a, b in zip(far, near, strict=True)), (far, near)
    assert list(student.module.state_dict()) == list(before)
    assert len(student.module(X)) == 1


def test_an_int8_student_follows_them_too() -> None:
    """With fake quantization an operator reads a quantized value: that is what follows the teacher's."""
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), (X[:2],))
    runtime, split = get_runtime("onnxruntime"), Split([X.numpy()], None, len(X))
    analysis = analyse(graph)
    done = quantize(graph, analysis, dict.fromkeys(analysis.operators, "int8"), runtime, Target("onnxruntime"), split)
    hints = shared_hints(graph, done.graph, ONE)
    assert hints == shared_hints(graph, graph, ONE)
    with torch.no_grad():
        for read, wanted in zip(with_hints(done.graph, hints).module(X)[1:], with_hints(graph, hints).module(X)[1:], strict=True):
            assert read.shape == wanted.shape
            assert (read - wanted).square().mean() < 0.05 * wanted.var()


def test_hints_take_a_part_of_the_room_and_the_deepest_come_first(tmp_path: Path) -> None:
    """The teacher's own outputs are cached even where no hint would fit beside them."""
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), (X[:2],))
    split = Split([X.numpy()], None, len(X))
    every = shared_hints(graph, graph, ONE)
    room = every[-1].numbers + every[-2].numbers
    assert Teacher(graph, split, tmp_path, largest_bytes=4 * 2 * len(X) * room).show(graph) == every[-2:]
    teacher = Teacher(graph, split, tmp_path, largest_bytes=16 * 4 * len(X))
    assert teacher.show(graph) == ()
    teacher.outputs(np.arange(4), [X[:4]])
    teacher.outputs(np.arange(4), [X[:4]])
    assert teacher.computed == 4


def test_hints_are_kept_in_half_precision_and_another_student_starts_anew(tmp_path: Path) -> None:
    graph = capture(randomise_norms(ResNet(2, 8)).eval(), (X[:2],))
    split = Split([X.numpy()], None, len(X))
    teacher = Teacher(graph, split, tmp_path)
    hints = teacher.show(graph)
    first, again = teacher.outputs(np.arange(8), [X[:8]]), teacher.outputs(np.arange(8), [X[:8]])
    assert teacher.computed == 8 and all(value.dtype == torch.float32 for value in again)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert np.load(tmp_path / "teacher.output1.npy", mmap_mode="r").dtype == np.float16
    assert teacher.show(graph) == hints
    teacher.outputs(np.arange(8), [X[:8]])
    assert teacher.computed == 8, "the same hints: nothing is computed again"
    analysis = analyse(graph)
    last = stream_of(analysis, "fc.weight")
    fewer = teacher.show(smaller(graph, widths={last: analysis.groups[last].units // 2}))
    assert len(teacher.outputs(np.arange(8), [X[:8]])) == 1 + len(fewer) < 1 + len(hints)
    assert teacher.computed == 16

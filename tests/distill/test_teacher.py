"""The teacher computes each output once, keeps it on disk, and does not notice what happens to the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nets import ResNet, TwoInputs, images, randomise_norms
from planish.data import Split
from planish.distill.teacher import Teacher
from planish.graph.capture import capture

X = images(40, 8)[0]
SPLIT = Split([X.numpy()], None, 40)


def batch(rows: list[int]) -> tuple[np.ndarray, list[Tensor]]:
    return np.array(rows), [X[rows]]


def test_outputs_are_the_originals_computed_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), (X[:2],))
    with torch.no_grad():
        expected = graph.module(X)[0].clone()
    teacher = Teacher(graph, SPLIT, tmp_path)
    with torch.no_grad():
        for parameter in graph.module.parameters():
            parameter.zero_()
    for rows, computed in (([3, 1, 39], 3), ([1, 3], 3), ([1, 5, 39], 4), ([5, 3, 1, 39], 4)):
        (found,) = teacher.outputs(*batch(rows))
        torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-5)
        assert teacher.computed == computed and not found.requires_grad and not found.is_inference()
    mapped = np.load(tmp_path / "teacher.output0.npy", mmap_mode="r")
    assert mapped.shape == (40, 10) and not mapped[2].any() and mapped[3].any()


def test_without_folder_or_room_nothing_is_kept(tmp_path: Path) -> None:
    graph = capture(ResNet(1, 8).eval(), (X[:2],))
    for teacher in (Teacher(graph, SPLIT), Teacher(graph, SPLIT, tmp_path, largest_bytes=10)):
        first, second = teacher.outputs(*batch([1, 2])), teacher.outputs(*batch([1, 2]))
        assert torch.equal(first[0], second[0]) and teacher.computed == 4
    assert not list(tmp_path.iterdir())


def test_another_split_is_kept_in_memory_with_all_outputs() -> None:
    left, right = torch.randn(300, 6), torch.randn(300, 4)
    graph = capture(TwoInputs().eval(), (left[:2], right[:2]))
    split = Split([left.numpy(), right.numpy()], None, 300)
    teacher = Teacher(graph, SPLIT)
    chosen, outputs = teacher.on(split, 1000)
    assert teacher.on(split, 1000)[1] is outputs and teacher.computed == chosen.n == 300
    with torch.no_grad():
        for found, expected in zip(outputs, graph.module(left, right), strict=True):
            torch.testing.assert_close(found, expected)
    fewer, outputs = teacher.on(split, 4)
    np.testing.assert_array_equal(fewer.inputs[0], left.numpy()[[0, 99, 199, 299]])
    assert outputs[0].shape == (4, 3)

"""Where quantizers are put: counted and named on small programs whose right placement is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantizing import captured, everything
from torch import Tensor, nn

import nets
from planish.graph.fold import fold_batch_norm
from planish.quantize.placement import Placement, Read, place

ALL = frozenset({"conv", "linear", "matmul", "add", "pool"})


def placed(
    model: nn.Module, example: object, *chosen: str, inputs: frozenset[str] = ALL, outputs: frozenset[str] = frozenset()
) -> Placement:
    graph, analysis = captured(model, example)
    names = chosen or tuple(everything(analysis))
    nodes = {name: analysis.operators[name].node for name in names}
    return place(fold_batch_norm(graph).module, nodes, inputs, outputs)


class Chain(nn.Module):
    """conv - batch norm - relu - max pool - conv - gelu - conv - view - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.third, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.last(self.third(F.gelu(self.second(x))).flatten(1))


def test_quantizers_follow_the_fused_rectifier_and_precede_movements() -> None:
    found = placed(Chain(), nets.images(size=8))
    assert list(found.activations) == ["x", "relu", "gelu", "conv2d_2"]
    assert found.activations["relu"] == (Read("max_pool2d", 0),)
    assert found.activations["conv2d_2"] == (Read("flatten", 0),)
    assert {name: axis for name, (_, axis) in found.weights.items()} == dict.fromkeys(found.weights, 0) and len(found.weights) == 4
    assert not found.skipped and not found.repeats


def test_an_operator_alone_gets_its_own_input_quantizer() -> None:
    found = placed(Chain(), nets.images(size=8), "second")
    assert found.activations == {"relu": (Read("max_pool2d", 0),)}
    assert list(found.operators) == ["second"] and len(found.weights) == 1


def test_outputs_are_quantized_where_the_runtime_needs_it() -> None:
    found = placed(Chain(), nets.images(size=8), outputs=frozenset({"conv"}))
    assert found.activations["conv2d_1"] == (Read("gelu", 0),)
    assert list(found.activations) == ["x", "relu", "conv2d_1", "gelu", "conv2d_2"]


def test_a_value_read_in_int8_and_in_float_has_one_quantizer_for_int8_alone() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = F.relu(self.stem(x))
            return self.left(x), self.right(x), x.exp()

    found = placed(Fork(), (torch.randn(2, 4, 5, 5),))
    assert list(found.activations) == ["x", "relu"]
    assert found.activations["relu"] == (Read("conv2d_1", 0), Read("conv2d_2", 0))


def test_residual_additions_between_int8_operators_are_int8() -> None:
    model, example = nets.resnet(blocks=1, option="A")
    found = placed(model, example)
    readers = [read.node for reads in found.activations.values() for read in reads]
    assert sum(name.startswith("add") for name in readers) == 6
    assert "adaptive_avg_pool2d" in readers
    assert all(not name.startswith("slice") or name in readers for name in found.activations)
    # both shortcuts that pad are quantized before their slices and, for the sum behind it, once more after the padding
    assert sorted(found.repeats) == ["pad", "pad_1"] and set(found.repeats.values()) <= set(found.activations)
    assert all(found.repeats[name].startswith("relu") for name in found.repeats)
    without = placed(model, example, inputs=frozenset({"conv", "linear"}))
    assert not any(read.node.startswith("add") for reads in without.activations.values() for read in reads)
    assert len(without.activations) == 8


def test_a_sum_reads_what_an_operator_issues_for_it_alone_as_it_is() -> None:
    model, example = nets.resnet(blocks=2, option="B")
    found = placed(model, example, inputs=frozenset({"conv", "linear", "sum", "pool"}))
    summands = [(value, read.position) for value, reads in found.activations.items() for read in reads if read.node.startswith("add")]
    graph, _ = captured(model, example)
    additions = [node for node in graph.module.graph.nodes if node.name.startswith("add")]
    assert len(summands) == len(additions) == 6  # one each: the shortcut, be it a rectified sum or a convolution of its own
    both = placed(model, example)
    assert sum(read.node.startswith("add") for reads in both.activations.values() for read in reads) == 12


def test_residual_streams_of_transformers_stay_in_float() -> None:
    model, example = nets.bert()
    found = placed(model, example)
    readers = [read.node for reads in found.activations.values() for read in reads]
    assert readers and not any(name.startswith(("add", "mean")) for name in readers)
    assert any("attention" in reason for reason in found.skipped.values())


def test_the_last_addition_before_a_float_output_stays_in_float() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.relu(self.one(x))) + x

    assert list(placed(Residual(), (torch.randn(2, 4, 5, 5),)).activations) == ["x", "relu"]


def test_a_shared_weight_has_one_quantizer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(torch.tanh(self.map(x)))

    found = placed(Twice(), (torch.randn(2, 6),))
    assert len(found.weights) == 1
    ((readers, _),) = found.weights.values()
    assert [read.position for read in readers] == [1, 1]


def test_matrix_products_of_activations_get_both_operands_quantized() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.query(x) @ self.key(x).transpose(1, 2)
            return scores.softmax(-1) @ x

    found = placed(Product(), (torch.randn(2, 5, 6),))
    assert list(found.activations) == ["x", "linear", "linear_1", "softmax"]
    assert found.activations["linear_1"] == (Read("transpose", 0),)
    assert Read("matmul_1", 0) in found.activations["softmax"] and Read("matmul_1", 1) in found.activations["x"]


def test_what_has_no_int8_form_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x))

    found = placed(Odd(), (torch.randn(2, 4, 5, 5),))
    assert found.skipped == {"up": "the runtime executes no conv_transpose in int8"}
    assert list(found.operators) == ["down"]
    unwanted = placed(Odd(), (torch.randn(2, 4, 5, 5),), inputs=frozenset({"linear"}))
    assert unwanted.skipped["down"] == "the runtime executes no conv in int8" and not unwanted.activations


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, ""),
        ({"kernel_size": 2}, ""),
        ({"groups": 2}, "a transposed convolution in groups has no int8 kernel"),
        ({"dilation": 2}, "a dilated transposed convolution is slower in int8"),
        ({"stride": 4}, "a transposed convolution has an int8 kernel only for strides up to 3 and kernels no smaller than the stride"),
        ({"kernel_size": 1}, "a transposed convolution has an int8 kernel only for strides up to 3 and kernels no smaller than the stride"),
        ({"is_rectified": False}, "a transposed convolution has an int8 kernel only behind a rectifier; its input may be below zero"),
    ],
)
def test_a_transposed_convolution_is_int8_where_there_is_a_kernel(settings: dict[str, int], reason: str) -> None:
    given = {"kernel_size": 4, "stride": 2, **settings}
    rectifier = nn.ReLU() if given.pop("is_rectified", True) else nn.Tanh()
    model = nn.Sequential(nn.Conv2d(4, 4, 3), rectifier, nn.MaxPool2d(2), nn.ConvTranspose2d(4, 6, **given))
    found = placed(model, (torch.randn(2, 4, 9, 9),), inputs=ALL | {"conv_transpose"})
    assert found.skipped == ({"3": reason} if reason else {})
    if not reason:
        assert next(axis for _, axis in list(found.weights.values())[1:]) == 1

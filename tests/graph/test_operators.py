"""Operators: kinds, sizes as linear forms, fusion, who reads whom, and multiply-accumulates by hand."""

from __future__ import annotations

import dataclasses

import oddities
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nets
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Size
from planish.graph.groups import analyse
from planish.graph.macs import macs, operator_macs


def kinds(analysis: Analysis) -> list[tuple[str, str]]:
    return [(operator.name, operator.kind) for operator in analysis.operators.values()]


def test_resnet_operators_in_order() -> None:
    analysis = oddities.analysed("resnet_small")
    convolutions = ["conv1", *(f"layer{layer}.0.conv{i}" for layer in (1, 2, 3) for i in (1, 2))]
    found = [(name, kind) for name, kind in kinds(analysis) if kind != "other"]
    assert found == [*((name, "conv") for name in convolutions), ("adaptive_avg_pool2d", "pool"), ("fc", "linear")]
    assert [operator.attributes["op"] for operator in analysis.operators.values() if operator.kind == "other"] == ["pad", "pad"]


def test_batch_norm_is_folded_and_the_last_convolution_fuses_the_addition() -> None:
    operators = oddities.analysed("resnet_b").operators
    assert operators["conv1"].fused == ("relu",)
    assert operators["layer1.0.conv2"].fused == ("add", "relu")
    assert operators["layer1.0.conv2"].reads == ("layer1.0.conv1", "conv1")
    # The projection runs after the second convolution, so the addition is its own.
    assert operators["layer2.0.conv2"].fused == ()
    assert operators["layer2.0.shortcut.0"].fused == ("add", "relu")
    assert operators["layer2.0.shortcut.0"].reads == ("layer1.1.conv2", "layer2.0.conv2")


def test_sizes_follow_widths() -> None:
    analysis = oddities.analysed("resnet_a")
    second = analysis.operators["layer2.0.conv2"]
    assert [size.full for size in second.inputs[0]] == [2, 16, 8, 8]
    widths = {"layer2.0.conv1": 5, "conv1": 3, "layer2.0.conv2": 6}
    assert [size.at(widths) for size in second.inputs[0]] == [2, 5, 8, 8]
    assert [size.at(widths) for size in second.output] == [2, 9, 8, 8]  # 3 of the early channels and 6 of the padding's
    assert [size.at(widths) for size in second.weights[0]] == [9, 5, 3, 3]
    assert second.output[1].terms == ((("conv1",), 1), (("layer2.0.conv2",), 1))


def test_sizes_are_those_of_the_example_whatever_batch_was_analysed() -> None:
    graph, example = oddities.captured("bert_small")
    single = tuple(graph.signature.flatten(nets.resized(example, 1)))
    analysis = analyse(dataclasses.replace(graph, example=single))
    (attention,) = (o for o in analysis.operators.values() if o.kind == "attention")
    assert [size.full for size in attention.inputs[0]] == [1, 4, 12, 12]
    heads = "bert.encoder.layer.0.attention.self.query"
    assert [size.at({heads: 3}) for size in attention.inputs[0]] == [1, 3, 12, 12]


def test_a_size_that_merges_batch_and_heads_scales() -> None:
    size = Size(full=8, terms=((("heads",), 2),), units=((4,),))
    assert [size.at({"heads": kept}) for kept in (1, 2, 4)] == [2, 4, 8]


def test_bert_operators() -> None:
    analysis = oddities.analysed("bert_small")
    path = "bert.encoder.layer.0"
    found = kinds(analysis)
    for leaf in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense"):
        assert (f"{path}.{leaf}", "linear") in found
    assert (f"{path}.attention.output.LayerNorm", "norm") in found
    assert ("bert.embeddings.word_embeddings", "embedding") in found
    assert analysis.operators[f"{path}.intermediate.dense"].fused == ("gelu",)
    (attention,) = (o for o in analysis.operators.values() if o.kind == "attention")
    assert attention.reads == tuple(f"{path}.attention.self.{leaf}" for leaf in ("query", "key", "value"))
    assert analysis.operators[f"{path}.attention.output.dense"].reads[0] == attention.name


def test_recurrent_operators() -> None:
    analysis = oddities.analysed("lstm")
    assert kinds(analysis) == [("embedding", "embedding"), ("rnn.l0", "lstm"), ("rnn.l1", "lstm"), ("fc", "linear")]
    assert analysis.operators["rnn.l1"].reads == ("rnn.l0",)
    assert [size.at({"rnn.l0": 10, "rnn.l1": 7}) for size in analysis.operators["rnn.l1"].weights[0]] == [28, 10]
    assert [size.at({"rnn.l1": 7}) for size in analysis.operators["rnn.l1"].output] == [2, 12, 7]


def test_a_convolution_that_is_used_twice_is_two_operators() -> None:
    analysis = oddities.analysed("used_twice")
    assert [name for name, kind in kinds(analysis) if kind == "conv"] == ["a", "b", "b#2"]
    assert analysis.operators["b"].weight == analysis.operators["b#2"].weight == "b.weight"


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 12), 2 * 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(8, 16, 3, 2, 1, groups=4), (1, 8, 8, 8), 4 * 4 * 16 * 2 * 9),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 25),
        (nn.ConvTranspose2d(4, 6, 2, 2), (1, 4, 5, 5), 5 * 5 * 4 * 6 * 4),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), 2 * 7 * 6 * 4 * 3),
        (nn.Linear(5, 7), (3, 4, 5), 3 * 4 * 5 * 7),
    ],
)
def test_macs_by_hand(model: nn.Module, example: tuple[int, ...], expected: int) -> None:
    analysis = analyse(capture(model, (torch.zeros(example),)))
    assert macs(analysis) == expected


def test_macs_of_attention_and_recurrence_by_hand() -> None:
    lstm = oddities.analysed("lstm").operators
    assert operator_macs(lstm["rnn.l0"]) == 2 * 12 * 4 * 32 * (24 + 32)
    assert operator_macs(lstm["rnn.l0"], {"rnn.l0": 8, "embedding": 6}) == 2 * 12 * 4 * 8 * (6 + 8)
    bert = oddities.analysed("bert_small").operators
    (attention,) = (o for o in bert.values() if o.kind == "attention")
    assert operator_macs(attention) == 2 * 4 * (12 * 12) * (12 + 12)
    explicit = oddities.analysed("explicit_attention").operators
    assert [operator_macs(o) for o in explicit.values() if o.kind == "matmul"] == [2 * 4 * 6 * 6 * 6] * 2


class WeightFirst(nn.Module):
    """A parameter times an activation: `[7, 5] @ [5, 3]` for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.mix, x)


def test_macs_of_products_with_a_parameter_by_hand() -> None:
    assert macs(analyse(capture(WeightFirst(), (torch.zeros(2, 5, 3),)))) == 2 * 7 * 5 * 3
    mixed = [o for o in oddities.analysed("summed").operators.values() if o.kind == "matmul"]
    assert [operator_macs(o) for o in mixed] == [2 * 7 * 16 * 10]


def test_a_value_that_is_two_operands_counts_as_both() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.m = nn.Linear(6, 16), nn.Linear(6, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, m = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.m))
            return F.scaled_dot_product_attention(q, m, m), torch.einsum("bhic,bhjc->bhij", m, m)

    operators = analyse(capture(Memory().eval(), (torch.randn(2, 5, 6),))).operators
    attention = next(o for o in operators.values() if o.kind == "attention")
    product = next(o for o in operators.values() if "equation" in o.attributes)
    assert [len(shape) for shape in attention.inputs] == [4, 4, 4]
    assert operator_macs(attention) == 2 * 4 * 5 * 5 * 8
    assert operator_macs(product) == 2 * 4 * 5 * 5 * 4

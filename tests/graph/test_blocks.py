"""Residual branches: which can be bypassed, and that bypassing equals a net without them."""

from __future__ import annotations

import oddities
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from planish.errors import UnknownName
from planish.graph.blocks import bypass
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference, prune


def test_padding_shortcuts_can_be_bypassed_and_projections_cannot() -> None:
    everything = {f"layer{layer}.{block}" for layer in (1, 2, 3) for block in (0, 1)}
    assert set(oddities.analysed("resnet_a").blocks) == everything
    assert set(oddities.analysed("resnet_b").blocks) == everything - {"layer2.0", "layer3.0"}


def test_a_block_says_what_vanishes() -> None:
    block = oddities.analysed("resnet_a").blocks["layer2.0"]
    assert block.operators == ("layer2.0.conv1", "layer2.0.conv2")
    leaves = ["bn1.bias", "bn1.weight", "bn2.bias", "bn2.weight", "conv1.weight", "conv2.weight"]
    assert block.parameters == tuple(f"layer2.0.{leaf}" for leaf in leaves)


def test_bypassing_a_padding_block_leaves_its_padding() -> None:
    model, example = nets.resnet(2, "A")
    graph, analysis = oddities.captured("resnet_a")[0], oddities.analysed("resnet_a")
    without = bypass(graph, analysis, ["layer2.0", "layer1.1"])
    x = F.relu(model.bn1(model.conv1(example[0])))
    x = model.layer1[0](x)
    x = F.relu(x)  # the addition of layer1.1 passes x on, and its ReLU is applied to it again
    x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
    x = model.layer3(model.layer2[1](x))
    expected = model.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
    assert torch.equal(without.module(*example)[0], expected)
    gone = {name for block in ("layer2.0", "layer1.1") for name in analysis.blocks[block].parameters}
    assert {n for n, _ in graph.module.named_parameters()} - {n for n, _ in without.module.named_parameters()} == gone
    assert not any(name.startswith(("layer2.0.", "layer1.1.")) for name, _ in without.module.named_buffers())


def test_bert_has_two_blocks_in_a_layer() -> None:
    blocks = oddities.analysed("bert_small").blocks
    assert set(blocks) == {"bert.encoder.layer.0.attention", "bert.encoder.layer.0"}
    attention = blocks["bert.encoder.layer.0.attention"].parameters
    assert {name.split("attention.")[1].rpartition(".")[0] for name in attention} == {
        "self.query",
        "self.key",
        "self.value",
        "output.dense",
    }


def test_mobilenet_has_a_block_where_widths_agree() -> None:
    assert set(oddities.analysed("mobilenet").blocks) == {"blocks.1", "blocks.3"}


@pytest.mark.parametrize("name", ["densenet", "lstm", "two_inputs"])
def test_no_residual_branch_no_block(name: str) -> None:
    assert not oddities.analysed(name).blocks


class TwoSources(nn.Module):
    """A sum whose branch also reads another layer: nothing single could be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        return self.fc(first + self.c(first * second)) + second.sum(-1, keepdim=True)


def test_a_branch_of_two_sources_is_no_block() -> None:
    torch.manual_seed(0)
    assert not analyse(capture(TwoSources(), (torch.randn(2, 8),))).blocks


def test_everything_can_be_bypassed_then_pruned_and_trained() -> None:
    (graph, example), analysis = oddities.captured("resnet_a"), oddities.analysed("resnet_a")
    small = bypass(graph, analysis, ["layer1.0", "layer1.1", "layer3.0"])
    again = analyse(small)
    assert set(again.blocks) == {"layer2.0", "layer2.1", "layer3.1"}
    gone = {f"{block}.conv{i}" for block in ("layer1.0", "layer1.1", "layer3.0") for i in (1, 2)}
    # The ReLU after the padding of layer3.0 has no convolution left that would fuse it.
    assert {o.name for o in again.operators.values() if o.kind != "elementwise"} == set(analysis.operators) - gone
    assert [o.reads for o in again.operators.values() if o.kind == "elementwise"] == [("pad_1",)]
    removed = {name: [0, 1] for name in again.groups}
    flat = nets.resized(example, 5)
    (found,) = prune(small, again, removed).graph.module(*flat)
    (expected,) = masked_reference(small, again, removed, flat)
    # 40 layers at most, 32 * 9 products each; see `rounding` in test_surgery.py.
    assert float((found - expected).detach().abs().max()) <= 2 * 40 * 32 * 9 * 2**-24
    found.sum().backward()


def test_the_caller_keeps_its_graph() -> None:
    graph, example = oddities.captured("mobilenet")
    before, names = graph.module(*example)[0], [n for n, _ in graph.module.named_parameters()]
    bypass(graph, analyse(graph), ["blocks.1"])
    assert torch.equal(graph.module(*example)[0], before)
    assert [n for n, _ in graph.module.named_parameters()] == names


def test_an_unknown_block_is_named() -> None:
    graph = oddities.captured("mobilenet")[0]
    with pytest.raises(UnknownName, match=r"no block named 'blocks\.0'"):
        bypass(graph, analyse(graph), ["blocks.0"])

"""Groups against lists written from the architectures by hand, and as a partition for any architecture."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np
import oddities
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nets
from planish.errors import UnknownName
from planish.graph.capture import capture
from planish.graph.graph import Analysis
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference, prune

Dims = set[tuple[str, int]]


def of_norm(*names: str) -> Dims:
    """Everything that a batch norm keeps per channel."""
    return {(f"{name}.{leaf}", 0) for name in names for leaf in ("weight", "bias", "running_mean", "running_var")}


def out(*names: str, bias: bool = False) -> Dims:
    return {(f"{name}.weight", 0) for name in names} | ({(f"{name}.bias", 0) for name in names} if bias else set())


def into(*names: str) -> Dims:
    return {(f"{name}.weight", 1) for name in names}


def assert_groups(analysis: Analysis, expected: dict[str, tuple[int, Dims]], inexact: Iterable[str] = ()) -> None:
    assert list(analysis.groups) == list(expected)
    for name, (units, dims) in expected.items():
        group = analysis.groups[name]
        assert (name, group.units, set(group.unit_of)) == (name, units, dims)
        assert group.exact == (name not in set(inexact)), name
    assert not analysis.unknown


def blocks_of(layer: int, count: int = 2) -> list[str]:
    return [f"layer{layer}.{block}" for block in range(count)]


def inner(block: str, width: int) -> dict[str, tuple[int, Dims]]:
    """The channels between the two convolutions of a basic block."""
    return {f"{block}.conv1": (width, out(f"{block}.conv1") | of_norm(f"{block}.bn1") | into(f"{block}.conv2"))}


def stream(blocks: Iterable[str]) -> Dims:
    """What the channels of a residual stream run through inside blocks that start from it and add to it."""
    return {d for b in blocks for d in into(f"{b}.conv1") | out(f"{b}.conv2") | of_norm(f"{b}.bn2")}


def test_resnet_with_padding_shortcuts() -> None:
    """Channels of an early stage run on through the middle of the later ones; each padding brings channels of its own."""
    one, two, three = blocks_of(1), blocks_of(2), blocks_of(3)
    first = out("conv1") | of_norm("bn1") | stream(one + two + three) | into("fc")
    # Those that the padding of a stage adds start at its first block's second convolution.
    second = stream(two + three) - into("layer2.0.conv1") | into("fc")
    third = stream(three) - into("layer3.0.conv1") | into("fc")
    assert_groups(
        oddities.analysed("resnet_a"),
        {
            "conv1": (8, first),
            **inner(one[0], 8),
            **inner(one[1], 8),
            **inner(two[0], 16),
            "layer2.0.conv2": (8, second),
            **inner(two[1], 16),
            **inner(three[0], 32),
            "layer3.0.conv2": (16, third),
            **inner(three[1], 32),
        },
    )


def test_padding_puts_the_early_channels_in_the_middle() -> None:
    analysis = oddities.analysed("resnet_a")
    none, eight = np.full(4, -1), np.arange(8)
    assert analysis.groups["conv1"].unit_of["layer2.0.conv2.weight", 0].tolist() == [*none, *eight, *none]
    assert analysis.groups["conv1"].unit_of["fc.weight", 1].tolist() == [*none, *none, *none, *eight, *none, *none, *none]
    assert analysis.groups["layer2.0.conv2"].unit_of["layer2.0.conv2.weight", 0].tolist() == [0, 1, 2, 3, *none, *none, 4, 5, 6, 7]


def test_resnet_with_projection_shortcuts() -> None:
    """A projection ends the stream of a stage, and its output is the stream of the next."""
    one, two, three = blocks_of(1), blocks_of(2), blocks_of(3)

    def projected(blocks: list[str]) -> Dims:
        return stream(blocks) - into(f"{blocks[0]}.conv1") | out(f"{blocks[0]}.shortcut.0") | of_norm(f"{blocks[0]}.shortcut.1")

    def read_by(blocks: list[str]) -> Dims:
        return into(f"{blocks[0]}.conv1", f"{blocks[0]}.shortcut.0")

    assert_groups(
        oddities.analysed("resnet_b"),
        {
            "conv1": (8, out("conv1") | of_norm("bn1") | stream(one) | read_by(two)),
            **inner(one[0], 8),
            **inner(one[1], 8),
            **inner(two[0], 16),
            "layer2.0.conv2": (16, projected(two) | read_by(three)),
            **inner(two[1], 16),
            **inner(three[0], 32),
            "layer3.0.conv2": (32, projected(three) | into("fc")),
            **inner(three[1], 32),
        },
    )


def test_mobilenet() -> None:
    """Expansion and depthwise convolution share channels; blocks 1 and 3 are residual."""

    def hidden(block: int, units: int) -> dict[str, tuple[int, Dims]]:
        b = f"blocks.{block}"
        dims = out(f"{b}.expand.0", f"{b}.depthwise.0") | of_norm(f"{b}.expand.1", f"{b}.depthwise.1") | into(f"{b}.project.0")
        return {f"{b}.expand.0": (units, dims)}

    def projected(*blocks: int) -> Dims:
        return {d for b in blocks for d in out(f"blocks.{b}.project.0") | of_norm(f"blocks.{b}.project.1")}

    assert_groups(
        oddities.analysed("mobilenet"),
        {
            "stem.0": (8, out("stem.0") | of_norm("stem.1") | into("blocks.0.expand.0")),
            **hidden(0, 24),
            "blocks.0.project.0": (16, projected(0, 1) | into("blocks.1.expand.0", "blocks.2.expand.0")),
            **hidden(1, 48),
            **hidden(2, 48),
            "blocks.2.project.0": (24, projected(2, 3) | into("blocks.3.expand.0", "head.0")),
            **hidden(3, 72),
            "head.0": (48, out("head.0") | of_norm("head.1") | into("classifier.1")),
        },
    )


def test_densenet() -> None:
    """Every layer's channels are read by all later norms and convolutions of its dense block, up to the transition."""
    dense1, dense2 = ([f"features.dense{b}.{i}" for i in range(3)] for b in (1, 2))

    def layers(names: list[str]) -> Dims:
        return {d for name in names for d in of_norm(f"{name}.norm") | into(f"{name}.conv")}

    def block(first: str, names: list[str], end: Dims, width: int) -> dict[str, tuple[int, Dims]]:
        groups = {first: (width, out(first) | layers(names) | end)}
        for i, name in enumerate(names):
            groups[f"{name}.conv"] = (8, out(f"{name}.conv") | layers(names[i + 1 :]) | end)
        return groups

    transition = of_norm("features.transition1.0") | into("features.transition1.2")
    assert_groups(
        oddities.analysed("densenet"),
        {
            **block("stem", dense1, transition, 16),
            **block("features.transition1.2", dense2, of_norm("norm") | into("fc"), 20),
        },
    )


def bert_layer(path: str) -> tuple[dict[str, tuple[int, Dims]], Dims]:
    """The groups of one layer (4 heads of 12, 96 feed-forward units), and what the residual stream runs through in it."""
    attention = f"{path}.attention.self"
    qkv = [f"{attention}.{leaf}" for leaf in ("query", "key", "value")]
    own = {
        f"{attention}.query": (4, out(*qkv, bias=True) | into(f"{path}.attention.output.dense")),
        f"{attention}.query.size": (12, out(*qkv[:2], bias=True)),
        f"{attention}.value.size": (12, out(qkv[2], bias=True) | into(f"{path}.attention.output.dense")),
        f"{path}.intermediate.dense": (96, out(f"{path}.intermediate.dense", bias=True) | into(f"{path}.output.dense")),
    }
    through = into(*qkv, f"{path}.intermediate.dense") | out(f"{path}.attention.output.dense", f"{path}.output.dense", bias=True)
    return own, through | out(f"{path}.attention.output.LayerNorm", f"{path}.output.LayerNorm", bias=True)


def bert_embeddings(path: str = "bert.embeddings") -> Dims:
    return into(*(f"{path}.{kind}_embeddings" for kind in ("word", "position", "token_type"))) | out(f"{path}.LayerNorm", bias=True)


def test_bert() -> None:
    """Heads are units; the residual stream runs through every layer norm, which makes it inexact."""
    first, in_first = bert_layer("bert.encoder.layer.0")
    second, in_second = bert_layer("bert.encoder.layer.1")
    residual = bert_embeddings() | in_first | in_second | into("bert.pooler.dense")
    analysis = oddities.analysed("bert")
    assert_groups(
        analysis,
        {
            "bert.embeddings.word_embeddings": (48, residual),
            **first,
            **second,
            "bert.pooler.dense": (48, out("bert.pooler.dense", bias=True) | into("classifier")),
        },
        inexact=["bert.embeddings.word_embeddings"],
    )
    query = analysis.groups["bert.encoder.layer.0.attention.self.query"]
    heads = np.repeat(np.arange(4), 12)
    for key in (("bert.encoder.layer.0.attention.self.key.weight", 0), ("bert.encoder.layer.0.attention.output.dense.weight", 1)):
        assert query.unit_of[key].tolist() == heads.tolist()
    places = analysis.groups["bert.encoder.layer.0.attention.self.query.size"]
    assert places.unit_of["bert.encoder.layer.0.attention.self.key.weight", 0].tolist() == list(range(12)) * 4
    assert set(places.recurs.values()) == {4} and not query.recurs


def test_bert_with_a_tied_decoder() -> None:
    """The decoder is the word embedding, so the head's transform issues the residual stream too; the vocabulary is an output."""
    layer, through = bert_layer("bert.encoder.layer.0")
    head = "cls.predictions.transform"
    ends = into(f"{head}.dense") | out(f"{head}.dense", f"{head}.LayerNorm", bias=True)
    analysis = oddities.analysed("bert_masked")
    assert_groups(
        analysis,
        {"bert.embeddings.word_embeddings": (48, bert_embeddings() | through | ends), **layer},
        inexact=["bert.embeddings.word_embeddings"],
    )


def recurrent_layer(gates: int, name: str, reads: Dims, hidden: int = 32) -> tuple[int, Dims]:
    del gates
    path, _, layer = name.rpartition(".")
    rows = {(f"{path}.{kind}_{layer}", 0) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    return hidden, rows | {(f"{path}.weight_hh_{layer}", 1)} | reads


@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3)])
def test_two_recurrent_layers(kind: str, gates: int) -> None:
    """A hidden unit is its row in every gate, its recurrent column, and a column of what reads it."""
    analysis = oddities.analysed(kind)
    assert_groups(
        analysis,
        {
            "embedding": (24, {("embedding.weight", 1), ("rnn.weight_ih_l0", 1)}),
            "rnn.l0": recurrent_layer(gates, "rnn.l0", {("rnn.weight_ih_l1", 1)}),
            "rnn.l1": recurrent_layer(gates, "rnn.l1", {("fc.weight", 1)}),
        },
    )
    assert analysis.groups["rnn.l0"].unit_of["rnn.weight_ih_l0", 0].tolist() == list(range(32)) * gates


def test_a_bidirectional_lstm() -> None:
    """Each direction has hidden units of its own; the layer above reads both."""
    both = {("rnn.weight_ih_l1", 1), ("rnn.weight_ih_l1_reverse", 1)}
    assert_groups(
        oddities.analysed("bilstm"),
        {
            "embedding": (24, {("embedding.weight", 1), ("rnn.weight_ih_l0", 1), ("rnn.weight_ih_l0_reverse", 1)}),
            "rnn.l0": recurrent_layer(4, "rnn.l0", both),
            "rnn.l0_reverse": recurrent_layer(4, "rnn.l0_reverse", both),
            "rnn.l1": recurrent_layer(4, "rnn.l1", {("fc.weight", 1)}),
            "rnn.l1_reverse": recurrent_layer(4, "rnn.l1_reverse", {("fc.weight", 1)}),
        },
    )


ODD_GROUPS: dict[str, dict[str, int]] = {
    "grouped": {"a": 4, "b": 6},  # 16 / 4 inputs and 24 / 4 outputs of each group
    "depth_multiplier": {"a": 8},
    "used_twice": {"a": 12},
    "tied": {"encode": 20},
    "squeeze_excite": {"a": 16, "down": 4},
    "split_and_cat": {"a": 16, "a#2": 4},  # 6 + 10 plain channels; 4 values with their gates
    "gated_linear": {"a": 10, "b": 4},
    "query_expand": {"q": 2, "q.size": 6, "v.size": 6},
    "query_flag": {"q": 2, "q.size": 6, "v.size": 6},
    "single_head": {"q": 8, "v": 10},
    "shared_constant": {"a": 16, "b": 16},
    "self_attention": {"embed": 24, "attention": 4, "attention.size": 6, "attention.out_proj": 24},
    "explicit_attention": {"qkv": 4, "qkv.size": 6},  # query, key and value are parts of one rectangle
    "rotary": {"q": 4, "v": 8},
    "shuffles": {"a": 8, "a.parts": 2, "b": 6, "c": 5},
    "transposed": {"a": 10, "up": 14},
    "cells": {"cell": 16},
    "statistics": {"a": 16, "b": 18},
    "summed": {"a": 16, "mix": 10},
}


@pytest.mark.parametrize("name", sorted(ODD_GROUPS))
def test_oddities_have_the_units_that_their_architecture_has(name: str) -> None:
    analysis = oddities.analysed(name)
    assert {group.name: group.units for group in analysis.groups.values()} == ODD_GROUPS[name]
    assert not analysis.unknown


def test_an_operator_without_a_rule_is_named_and_fixes_what_it_touches() -> None:
    analysis = oddities.analysed("never_seen")
    assert list(analysis.groups) == ["b"]
    assert list(analysis.unknown) == ["sort"]
    assert "`sort`" in analysis.reasons["a.weight"]
    assert analysis.reasons["fc.weight"] == "it is the program's output"


def test_an_input_that_is_the_output_stays() -> None:
    analysis = oddities.analysed("dict_output")
    assert not analysis.groups
    assert set(analysis.reasons) == {"conv1.weight", "conv2.weight"}


def test_keep_pins_the_groups_that_run_through_a_parameter() -> None:
    graph = oddities.captured("resnet_a")[0]
    analysis = analyse(graph, keep=["layer1.0.*", "fc.bias"])
    pinned = {name: group.pinned for name, group in analysis.groups.items() if group.pinned}
    assert pinned == {"conv1": "keep=layer1.0.*", "layer1.0.conv1": "keep=layer1.0.*"}
    assert analysis.reasons["layer1.0.conv1.weight"] == "keep=layer1.0.*"
    with pytest.raises(UnknownName, match=r"no parameter named 'layer7\.\*'"):
        analyse(graph, keep=["layer7.*"])


def test_keep_by_either_name_of_a_tied_weight() -> None:
    analysis = analyse(oddities.captured("bert_masked")[0], keep=["bert.embeddings.word_embeddings.weight"])
    assert analysis.groups["bert.embeddings.word_embeddings"].pinned


def test_a_batch_of_one_ties_nothing_that_a_batch_of_two_does_not() -> None:
    for name in ("resnet_a", "bert", "self_attention"):
        graph, example = oddities.captured(name)
        single = tuple(graph.signature.flatten(nets.resized(example, 1)))
        one, two = analyse(dataclasses.replace(graph, example=single)), oddities.analysed(name)
        assert {n: g.units for n, g in one.groups.items()} == {n: g.units for n, g in two.groups.items()}
        first = next(iter(one.operators.values()))
        assert first.inputs[0][0].full == 1


def test_the_random_state_and_the_running_statistics_stay() -> None:
    graph = oddities.captured("mobilenet")[0]
    before = {name: buffer.clone() for name, buffer in graph.module.named_buffers()}
    state = torch.random.get_rng_state()
    analyse(graph)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in graph.module.named_buffers())


class Drawn(nn.Module):
    """Convolutions put together as a list of words says."""

    def __init__(self, words: list[tuple[str, int]]) -> None:
        super().__init__()
        self.words, self.layers = words, nn.ModuleList()
        width = 8
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        for word, size in words:
            if word == "plain":
                self.layers.append(nn.Conv2d(width, size, 3, padding=1))
                width = size
            elif word == "residual":
                self.layers.append(nn.Sequential(nn.Conv2d(width, size, 1), nn.ReLU(), nn.Conv2d(size, width, 3, padding=1)))
            elif word == "dense":
                self.layers.append(nn.Conv2d(width, size, 3, padding=1))
                width += size
            elif word == "depthwise":
                self.layers.append(nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)))
            elif word == "gate":
                self.layers.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid()))
            elif word == "shuffle":
                self.layers.append(nn.Identity())
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for (word, _), layer in zip(self.words, self.layers, strict=True):
            if word in ("plain", "depthwise"):
                x = F.relu(layer(x))
            elif word == "residual":
                x = F.relu(x + layer(x))
            elif word == "dense":
                x = torch.cat([F.relu(layer(x)), x], 1)
            elif word == "gate":
                x = x * layer(x)
            else:
                x = x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.fc(x.mean((2, 3)))


_WORDS = st.tuples(st.sampled_from(["plain", "residual", "dense", "depthwise", "gate", "shuffle"]), st.sampled_from([4, 6, 10]))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_WORDS, max_size=4), st.integers(0, 2**16))
def test_groups_partition_the_indices_of_any_architecture(words: list[tuple[str, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = nets.randomise_norms(Drawn(words)).eval()
    example = nets.images(size=4)
    graph = capture(model, example)
    analysis = analyse(graph)
    owners: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in analysis.groups.values():
        seen = set()
        for key, unit_of in group.unit_of.items():
            assert len(unit_of) == graph.module.get_parameter(key[0]).shape[key[1]] if "running" not in key[0] else True
            owners.setdefault(key, []).append(unit_of)
            seen |= set(unit_of.tolist()) - {-1}
        assert seen == set(range(group.units))
    for several in owners.values():
        assert np.sum([unit_of >= 0 for unit_of in several], axis=0).max() <= 2
        for one, other in itertools.combinations(several, 2):  # an index has units of two groups where all of their units meet
            meetings = collections.Counter((a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True) if min(a, b) >= 0)
            assert len(meetings) in (0, (one.max() + 1) * (other.max() + 1)) and len(set(meetings.values())) <= 1
    generator = np.random.default_rng(seed)
    removed = {n: generator.permutation(g.units)[: g.units // 2].tolist() for n, g in analysis.groups.items()}
    (found,), (expected,) = prune(graph, analysis, removed).graph.module(*example), masked_reference(graph, analysis, removed, example)
    # At most 10 contractions of at most 38 * 9 products each; see `rounding` in test_surgery.py.
    assert float((found - expected).detach().abs().max()) <= 2 * 10 * 38 * 9 * 2**-24 * max(1.0, float(expected.detach().abs().max()))

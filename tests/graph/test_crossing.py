"""Heads and the size of heads: units of two readings of one program, which cross, and can both go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import families
import nets
import parity
from planish.graph.capture import capture
from planish.graph.crossing import crossing_of
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.graph.surgery import mask, masked_reference, prune
from planish.prune.levels import width_levels

KINDS = ("math", "sdpa", "queries, heads, size", "heads, queries, size", "split")


class Attention(nn.Module):
    """One attention layer between two linear maps, over sequences of 5."""

    def __init__(self, kind: str, heads: int, size: int, value_size: int) -> None:
        super().__init__()
        self.kind, self.heads, self.size = kind, heads, size
        self.value_size = value_size if kind in ("math", "sdpa") else size
        self.embed = nn.Linear(6, 8)
        if kind in ("math", "sdpa"):
            self.q, self.k, self.v = (nn.Linear(8, heads * n) for n in (size, size, self.value_size))
        else:
            self.qkv = nn.Linear(8, 3 * heads * size)
        self.out, self.fc = nn.Linear(heads * self.value_size, 8), nn.Linear(8, 3)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        if self.kind == "queries, heads, size":
            q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        elif self.kind == "heads, queries, size":
            q, k, v = self.qkv(x).view(batch, length, self.heads, 3, self.size).permute(3, 0, 2, 1, 4)
        else:
            three = self.qkv(x).chunk(3, -1) if self.kind == "split" else (self.q(x), self.k(x), self.v(x))
            q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in three)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.parts(x)
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.size), -1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.fc(torch.relu(x).mean(1))


def attention(kind: str, heads: int = 4, size: int = 6, value_size: int = 6, seed: int = 0) -> tuple[Graph, Analysis, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model, example = Attention(kind, heads, size, value_size).eval(), (torch.randn(2, 5, 6),)
    graph = capture(model, example)
    return graph, analyse(graph), example


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_their_size_are_both_units(kind: str) -> None:
    _, analysis, _ = attention(kind)
    first = "q" if kind in ("math", "sdpa") else "qkv"
    of_values = {"math": "v.size", "sdpa": "v.size", "split": "qkv.size#2"}.get(kind)
    expected = {"embed": 8, first: 4, f"{first}.size": 6} | ({of_values: 6} if of_values else {})
    assert {name: group.units for name, group in analysis.groups.items()} == expected


def test_what_each_unit_of_a_fused_projection_is() -> None:
    """Of 3 x 4 x 2 rows: a head has two places in each of query, key and value; a place recurs in every head, of queries and keys alike."""
    _, analysis, _ = attention("split", size=2)
    heads, of_values, places = (analysis.groups[name] for name in ("qkv", "qkv.size", "qkv.size#2"))
    assert heads.unit_of["qkv.weight", 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3
    assert places.unit_of["qkv.weight", 0].tolist() == [0, 1] * 8 + [-1] * 8
    assert of_values.unit_of["qkv.bias", 0].tolist() == [-1] * 16 + [0, 1] * 4
    assert heads.unit_of["out.weight", 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert of_values.unit_of["out.weight", 1].tolist() == [0, 1] * 4
    assert set(places.unit_of) == {("qkv.weight", 0), ("qkv.bias", 0)}
    assert set(of_values.unit_of) == {*places.unit_of, ("out.weight", 1)}
    assert places.roles["qkv.weight", 0] == "out" and of_values.roles["out.weight", 1] == "in"
    assert places.recurs == dict.fromkeys(places.unit_of, 4) and not heads.recurs


def test_few_heads_cross_the_places_that_are_the_better_units() -> None:
    """Of two heads one alone can go: places are what the net is read by, and heads are parts of them."""
    _, analysis, _ = attention("math", heads=2, size=8, value_size=8)
    assert {name: group.units for name, group in analysis.groups.items()} == {"embed": 8, "q": 8, "v": 8, "q.parts": 2}
    assert analysis.groups["q"].recurs and not analysis.groups["q.parts"].recurs


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.integers(2, 5), st.integers(2, 6), st.integers(2, 6), st.integers(0, 2**16))
def test_whatever_goes_of_both_surgery_equals_masking(kind: str, heads: int, size: int, value_size: int, seed: int) -> None:
    graph, analysis, example = attention(kind, heads, size, value_size, seed)
    generator = np.random.default_rng(seed)
    removed = {n: generator.permutation(g.units)[: generator.integers(g.units)].tolist() for n, g in analysis.groups.items()}
    pruned = prune(graph, analysis, removed)
    with torch.no_grad():
        for oracle in (masked_reference(graph, analysis, removed, example), mask(graph, analysis, removed).module(*example)):
            assert parity.difference(pruned.graph.module(*example), oracle) < parity.SURGERY
    for name, parameter in graph.module.named_parameters():
        for d in range(parameter.dim()):
            parameter = parameter.index_select(d, torch.from_numpy(pruned.kept.get((name, d), np.arange(parameter.shape[d]))))
        assert torch.equal(parameter, pruned.graph.module.get_parameter(name))
    widths = {name: group.units - len(removed[name]) for name, group in analysis.groups.items()}
    assert macs(analysis, widths) == macs(analyse(pruned.graph))
    for name, operator in analysis.operators.items():
        shapes = {tensor: tuple(value.shape) for tensor, value in pruned.graph.module.named_parameters()}
        found = [tuple(size.at(widths) for size in shape) for shape in operator.weights]
        assert found == [shapes[tensor] for tensor in operator.tensors if tensor in shapes], name


@pytest.mark.parametrize("name", ["bert", "llama", "swin"])
def test_each_kind_alone_and_both(name: str) -> None:
    model, example = families.build(name) if name in families.FAMILIES else nets.ZOO[name]()
    graph = capture(model, example)
    analysis = analyse(graph)
    places = [name for name, group in analysis.groups.items() if group.recurs]
    heads = [name for name in analysis.groups if any(crosses(analysis.groups[name], analysis.groups[other]) for other in places)]
    heads = [name for name in heads if name not in places]
    assert places and heads
    flat = graph.signature.flatten(example)
    for chosen in (places, heads, places + heads):
        removed = {name: [0] for name in chosen}
        error, effect = parity.surgery(graph, analysis, removed, flat)
        assert error < parity.SURGERY and effect > 1e-4, chosen


def crosses(one: Group, other: Group) -> bool:
    return any(key in other.unit_of and ((one.unit_of[key] >= 0) & (other.unit_of[key] >= 0)).any() for key in one.unit_of)


def test_the_scale_stays_that_of_the_whole_head() -> None:
    graph, analysis, _ = attention("sdpa")
    pruned = prune(graph, analysis, {"q.size": [0, 5]}).graph
    (node,) = [node for node in pruned.module.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert node.kwargs["scale"] == 1 / math.sqrt(6)


def test_rotary_places_go_in_pairs_and_in_all_layers() -> None:
    model, example = families.build("llama")
    group = analyse(capture(model, example)).groups["model.layers.0.self_attn.q_proj.size"]
    assert group.unit_of["model.layers.1.self_attn.k_proj.weight", 0].tolist() == [*range(6), *range(6)] * 2
    (angles,) = [key for key in group.unit_of if "inv_freq" in key[0]]
    assert group.unit_of[angles].tolist() == list(range(6))


def test_a_pin_holds_both() -> None:
    graph, _, _ = attention("math")
    pinned = {name for name, group in analyse(graph, keep=["q.*"]).groups.items() if group.pinned}
    assert pinned == {"embed", "q", "q.size"}
    assert {name for name, group in analyse(graph, keep=["out.weight"]).groups.items() if group.pinned} == {"embed", "q", "v.size"}


def test_widths_of_both_are_multiples_whatever_the_other_s() -> None:
    """Twelve heads of 64: any number of heads, and places in eights, since each head's are a matrix of their own."""
    _, analysis, _ = attention("math", heads=12, size=64, value_size=64)
    heads, places = width_levels(analysis.groups["q"], 8), width_levels(analysis.groups["q.size"], 8)
    assert heads == (12, 10, 9, 8, 6, 4, 3, 2) and places == (64, 56, 48, 40, 32, 24, 16, 8)
    assert all(h * s % 8 == 0 for h in heads for s in places)


def test_groups_cross_only_where_all_units_meet() -> None:
    key = ("w", 0)

    def group(name: str, *unit_of: int) -> Group:
        return Group(name, max(unit_of) + 1, {key: np.array(unit_of)}, {key: "out"})

    heads = {"heads": group("heads", 0, 0, 0, 1, 1, 1, -1, -1)}
    found = crossing_of(group("places", 0, 1, 2, 0, 1, 2, -1, -1), heads)
    assert found is not None and found.is_inside and found.where == {"heads": (key,)}
    whole = crossing_of(heads["heads"], {"places": group("places", 0, 1, 2, 2, 1, 0, 0, 1)})
    assert whole is not None and not whole.is_inside
    for other in (
        group("the same", 0, 0, 0, 1, 1, 1, -1, -1),
        group("not all", 0, 1, 2, 0, 1, 1, -1, -1),
        group("unequally often", 0, 1, 1, 0, 1, 1, -1, -1),
        group("elsewhere", -1, -1, -1, -1, -1, -1, 0, 1),
    ):
        assert crossing_of(other, heads) is None, other.name


def test_a_net_without_such_views_is_read_once() -> None:
    model, example = families.build("inception")
    analysis = analyse(capture(model, example))
    assert not any(group.recurs for group in analysis.groups.values())
    assert not any(val.across for val in analysis.ids.program.parameters.values())


class LinearAttention(nn.Module):
    """Attention without a softmax, whose sum over the past, [heads, size, size], the caller keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, past: Tensor) -> dict[str, Tensor]:
        q, k, v = (f(x).view(-1, 4, 6) for f in (self.q, self.k, self.v))
        past = 0.9 * past + k.unsqueeze(-1) * v.unsqueeze(-2)
        return {"y": self.out((q.unsqueeze(-2) @ past).flatten(1)), "next": past}


def test_heads_and_places_of_a_state_that_the_caller_steps() -> None:
    torch.manual_seed(0)
    graph = capture(LinearAttention().eval(), {"x": torch.randn(2, 6), "past": torch.randn(2, 4, 6, 6)}, {"past": "next"})
    analysis = analyse(graph)
    assert {name: group.units for name, group in analysis.groups.items()} == {"q": 4, "q.size": 6, "v.size": 6}
    removed = {"q": [1], "q.size": [0, 5], "v.size": [2]}
    pruned = prune(graph, analysis, removed).graph
    state = absent = torch.zeros(3, 4, 6, 6)
    for step in range(4):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            found, expected = pruned.module(x, state), masked_reference(graph, analysis, removed, [x, absent])
        assert parity.difference(found, expected) < parity.SURGERY
        state, absent = found[1], expected[1]
        assert int(state.count_nonzero()) == 3 * 3 * 4 * 5


class Interleaved(nn.Module):
    """Rotary positions that turn neighbours, as in GPT-J: every second place and the one behind it go together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v, self.out = (
            nn.Linear(6, 8),
            nn.Linear(8, 32),
            nn.Linear(8, 32),
            nn.Linear(8, 32),
            nn.Linear(32, 3),
        )
        angles = torch.arange(5)[:, None] * torch.rand(4)
        self.register_buffer("cos", angles.cos().repeat_interleave(2, -1))
        self.register_buffer("sin", angles.sin().repeat_interleave(2, -1))

    def turned(self, x: Tensor) -> Tensor:
        return x * self.cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(self.embed(x)).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2))


def test_places_that_a_step_picks_can_go_again_and_again() -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 5, 6),)
    graph = capture(Interleaved().eval(), example)
    for left in (4, 3, 2):
        analysis = analyse(graph)
        assert analysis.groups["q.size"].units == left
        smaller = prune(graph, analysis, {"q.size": [1]}).graph
        assert not any("index_select" in str(node.target) for node in smaller.module.graph.nodes)
        with torch.no_grad():
            assert parity.difference(smaller.module(*example), masked_reference(graph, analysis, {"q.size": [1]}, list(example))) < 1e-5
        graph = smaller


def test_a_single_head_of_keys_is_read_by_all_and_its_queries_may_go() -> None:
    class OneKey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(6, 32), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    example = (torch.randn(2, 5, 6),)
    graph = capture(OneKey().eval(), example)
    analysis = analyse(graph)
    heads = next(name for name, group in analysis.groups.items() if group.units == 4 and ("q.weight", 0) in group.unit_of)
    removed = {name: [0, 2] for name in analysis.groups}
    assert len(analysis.groups) == 3, heads
    with torch.no_grad():
        smaller = prune(graph, analysis, removed).graph.module(*example)
        assert parity.difference(smaller, masked_reference(graph, analysis, removed, list(example))) < 1e-5

"""Surgery: the pruned program equals the original with the removed elements absent, for every family and every oddity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import oddities
import pytest
import torch

import nets
from planish.errors import PlanError, UnknownName
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.graph.surgery import mask, masked_reference, prune

PRUNABLE = sorted(oddities.FAMILIES.keys() - {"dict_output"})  # its only hidden layer is an output
INEXACT = {"bert", "bert_small", "bert_masked", "statistics"}


def analysed(name: str) -> tuple[Graph, Analysis, Any]:
    graph, example = oddities.captured(name)
    return graph, oddities.analysed(name), example


def at_random(analysis: Analysis, share: float = 0.4, seed: int = 0) -> dict[str, list[int]]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.permutation(group.units)[: min(max(1, round(share * group.units)), group.units - 1)].tolist()
        for name, group in analysis.groups.items()
    }


def inputs(graph: Graph, example: Any, batch: int, seed: int = 3) -> list[torch.Tensor]:
    return graph.signature.flatten(nets.resized(example, batch, seed=seed))


def rounding(analysis: Analysis) -> float:
    """Relative error that float32 allows between two orders of summation.

    A contraction of K products in another order differs by at most 2 K u relative to the sum of magnitudes, with u = 2^-24. Values pass
    through L contractions one after the other; norms keep the gain of each near 1, so errors add up.
    """
    shapes = [operator.weights[0] for operator in analysis.operators.values() if operator.weights and operator.kind != "embedding"]
    longest = max(math.prod(size.full for size in shape[1:]) for shape in shapes if len(shape) > 1)
    return 2 * longest * 2**-24 * len(analysis.operators)


def assert_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], relative: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max()) <= relative * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_equals_the_original_with_elements_absent(name: str, batch: int) -> None:
    graph, analysis, example = analysed(name)
    if name == "movements" and batch == 1:
        pytest.skip("squeeze() without dimensions takes the batch away when it is 1, in the original too")
    removed, flat = at_random(analysis), inputs(graph, example, batch)
    pruned = prune(graph, analysis, removed).graph
    found, expected = pruned.module(*flat), masked_reference(graph, analysis, removed, flat)
    assert_close(found, expected, rounding(analysis))
    changed = max(float((a - b).detach().abs().max()) for a, b in zip(found, graph.module(*flat), strict=True))
    assert changed > 10 * rounding(analysis), "nothing that matters was removed"


@pytest.mark.parametrize("name", sorted(set(PRUNABLE) - INEXACT))
def test_pruned_equals_zeroed_parameters_where_groups_are_exact(name: str) -> None:
    """An oracle that knows parameters alone: no ids of activations are involved."""
    graph, analysis, example = analysed(name)
    assert all(group.exact for group in analysis.groups.values())
    removed, flat = at_random(analysis, seed=1), inputs(graph, example, 3)
    zeroed = mask(graph, analysis, removed)
    assert_close(prune(graph, analysis, removed).graph.module(*flat), zeroed.module(*flat), rounding(analysis))


@pytest.mark.parametrize("name", ["resnet_a", "mobilenet", "densenet", "bert", "lstm", "self_attention", "grouped", "cells"])
def test_one_unit_of_every_group_is_enough(name: str) -> None:
    graph, analysis, example = analysed(name)
    removed = {group: list(range(1, found.units)) for group, found in analysis.groups.items()}
    flat = inputs(graph, example, 2)
    assert_close(prune(graph, analysis, removed).graph.module(*flat), masked_reference(graph, analysis, removed, flat), rounding(analysis))


@pytest.mark.parametrize("name", sorted(nets.SEQUENCE))
def test_the_sequence_stays_dynamic(name: str) -> None:
    graph, analysis, example = analysed(name)
    removed = at_random(analysis)
    flat = graph.signature.flatten(nets.resized(example, 3, length=7))
    assert_close(prune(graph, analysis, removed).graph.module(*flat), masked_reference(graph, analysis, removed, flat), rounding(analysis))


@pytest.mark.parametrize("name", ["resnet_b", "bert_masked", "gru", "used_twice", "tied", "shared_constant"])
def test_the_caller_keeps_everything_and_the_copy_trains(name: str) -> None:
    graph, analysis, example = analysed(name)
    before = {key: value.clone() for key, value in graph.module.state_dict(keep_vars=False).items()}
    code = graph.module.code
    pruned = prune(graph, analysis, at_random(analysis)).graph
    assert graph.module.code == code
    assert all(torch.equal(value, before[key]) for key, value in graph.module.state_dict().items())
    assert [n for n, _ in pruned.module.named_parameters()] == [n for n, _ in graph.module.named_parameters()]
    for (_, old), (_, new) in zip(graph.module.named_parameters(), pruned.module.named_parameters(), strict=True):
        assert (new.dtype, new.requires_grad, new.is_leaf) == (old.dtype, old.requires_grad, True)
        assert new.data_ptr() != old.data_ptr()
    sum(out.float().square().sum() for out in pruned.module(*inputs(graph, example, 4))).backward()
    assert all(p.grad is None for p in graph.module.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in pruned.module.parameters() if p.grad is not None)
    assert {n.name for n in graph.module.graph.nodes} <= {n.name for n in pruned.module.graph.nodes}


def test_tied_weights_stay_tied() -> None:
    graph, analysis, _ = analysed("bert_masked")

    def ties(module: torch.nn.Module) -> set[frozenset[str]]:
        names: dict[int, set[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        return {frozenset(same) for same in names.values() if len(same) > 1}

    assert ties(prune(graph, analysis, at_random(analysis)).graph.module) == ties(graph.module)


def test_kept_says_which_indices_survive() -> None:
    graph, analysis, _ = analysed("resnet_a")
    pruned = prune(graph, analysis, {"layer1.0.conv1": [0, 3, 7]})
    stay = [1, 2, 4, 5, 6]
    expected = {("layer1.0.conv1.weight", 0), ("layer1.0.conv2.weight", 1)}
    expected |= {(f"layer1.0.bn1.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert pruned.kept.keys() == expected
    assert all(kept.tolist() == stay for kept in pruned.kept.values())
    old, new = graph.module.get_parameter("layer1.0.conv2.weight"), pruned.graph.module.get_parameter("layer1.0.conv2.weight")
    assert torch.equal(new, old[:, stay])


def test_removing_nothing_changes_nothing() -> None:
    graph, analysis, example = analysed("densenet")
    flat = inputs(graph, example, 2)
    pruned = prune(graph, analysis, {"stem": []})
    assert not pruned.kept
    assert_close(pruned.graph.module(*flat), graph.module(*flat), 0.0)


def test_pruning_twice_equals_pruning_once() -> None:
    graph, analysis, example = analysed("resnet_a")
    once = prune(graph, analysis, {"conv1": [1, 5], "layer2.0.conv1": [0, 2]}).graph
    first = prune(graph, analysis, {"conv1": [1]}).graph
    second = prune(first, analyse(first), {"conv1": [4], "layer2.0.conv1": [0, 2]}).graph
    flat = inputs(graph, example, 3)
    assert_close(second.module(*flat), once.module(*flat), 0.0)


@pytest.mark.parametrize("name", PRUNABLE)
def test_linear_forms_predict_the_macs_of_the_pruned_net(name: str) -> None:
    graph, analysis, _ = analysed(name)
    removed = at_random(analysis, seed=2)
    widths = {group: analysis.groups[group].units - len(units) for group, units in removed.items()}
    assert macs(analysis, widths) == macs(analyse(prune(graph, analysis, removed).graph)) < macs(analysis)


@pytest.mark.parametrize(
    ("removed", "error", "message"),
    [
        ({"layer9": [0]}, UnknownName, "no group named 'layer9'"),
        ({"conv1": [8]}, PlanError, r"units of group 'conv1' must be in \[0, 8\); got 8"),
        ({"conv1": [-1]}, PlanError, r"must be in \[0, 8\); got -1"),
        ({"conv1": list(range(8))}, PlanError, "must keep at least one of its 8 units"),
    ],
)
def test_bad_removals_are_refused(removed: Mapping[str, Sequence[int]], error: type[Exception], message: str) -> None:
    graph, analysis, _ = analysed("resnet_a")
    for operation in (prune, mask):
        with pytest.raises(error, match=message):
            operation(graph, analysis, removed)


def test_a_pinned_group_is_refused() -> None:
    graph, _, _ = analysed("resnet_a")
    with pytest.raises(PlanError, match=r"group 'conv1' must keep all its units \(keep=bn1\.\*\)"):
        prune(graph, analyse(graph, keep=["bn1.*"]), {"conv1": [0]})


def test_the_scale_of_attention_is_pinned_when_its_head_size_shrinks() -> None:
    graph, analysis, _ = analysed("rotary")
    pruned = prune(graph, analysis, {"q": [1]}).graph.module
    (attention,) = (n for n in pruned.graph.nodes if "scaled_dot_product" in n.name)
    assert attention.kwargs["scale"] == pytest.approx(8**-0.5)

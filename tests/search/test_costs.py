"""Costs as factors against the same costs counted plan by plan; kernels, gaps in the tables, interpolation, the affine correction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nets
from planish.budget import Budget
from planish.errors import BudgetError
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Operator, Size
from planish.graph.groups import analyse
from planish.graph.macs import macs, operator_macs
from planish.graph.surgery import prune
from planish.measure.kernels import Kernel
from planish.plan import Option, Plan
from planish.search.contract import Limits
from planish.search.costs import Affine, Costs, calibrated, ceilings, reachable_kernels, tilt
from planish.search.kernels import grids, kernel_of, terms_of
from planish.search.lagrangian import Problem
from planish.search.soft import soft_price
from planish.search.solver import Solver
from planish.search.space import Space
from planish.testing.search import kernel_seconds, made_up, options_of, residual_net

TEMPLATE = Plan(target="made-up:cpu")


def some(space, count=40, seed=0):
    rng = np.random.default_rng(seed)
    return [space.canonical([int(rng.integers(size)) for size in space.sizes]) for _ in range(count)]


def by_hand(space, plan):
    """Seconds of a plan's operators and conversions, without factors."""
    gone = {name for block in plan.blocks for name in space.analysis.blocks[block].operators}
    operators = {name: o for name, o in space.analysis.operators.items() if name not in gone}
    readers = {name: sum(name in o.reads for o in space.analysis.operators.values()) for name in space.analysis.operators}
    seconds = 0.0
    for name, operator in operators.items():
        scheme = plan.precisions.get(name, "fp32")
        seconds += kernel_seconds([kernel_of(operator, plan.widths, scheme)])[0]
        others = [read for read in operator.reads if read in operators and "pool" not in (name, read)]
        changed = [(operators[read].output, readers[read]) for read in others if plan.precisions.get(read, "fp32") != scheme]
        for shape, share in changed:
            sizes = tuple(size.at(plan.widths) for size in shape)
            seconds += 0.5 / share * kernel_seconds([Kernel("conversion", (sizes,), sizes)])[0]
    return seconds


def test_latency_is_the_sum_over_operators_and_conversions():
    space, costs = made_up()
    for assignment in some(space):
        assert costs.predict(assignment)["latency"] == pytest.approx(by_hand(space, space.plan(assignment)), rel=1e-12)


def test_shares_add_up_to_the_latency_and_a_removed_block_has_none():
    space, costs = made_up()
    for assignment in some(space, 10):
        shares = costs.shares(assignment)
        assert sum(shares.values()) == pytest.approx(costs.predict(assignment)["latency"])
        for block in space.plan(assignment).blocks:
            assert all(shares[name] == 0 for name in space.analysis.blocks[block].operators)


def test_macs_are_those_of_the_graph():
    space, costs = made_up()
    for assignment in some(space, 20):
        plan = space.plan(assignment)
        gone = {name for block in plan.blocks for name in space.analysis.blocks[block].operators}
        want = sum(operator_macs(o, plan.widths) for name, o in space.analysis.operators.items() if name not in gone)
        assert costs.predict(assignment)["macs"] == want
    assert costs.predict(space.identity)["macs"] == macs(space.analysis)


def test_size_counts_matrices_in_their_precision_and_shared_weights_once():
    analysis = residual_net(blocks=1, units=16)
    operators = dict(analysis.operators)
    tied = operators["head"]
    operators["again"] = Operator("again", "again", "linear", "head.weight", tied.inputs, tied.output, tied.weights[:1], {}, (), ("pool",))
    analysis = Analysis(analysis.groups, analysis.blocks, operators, {}, {})
    space = Space(analysis, [Option("precision", "head", "int8", 0.1), Option("width", "stem", 8, 0.1)], TEMPLATE)
    costs = Costs(space, None)
    weights = 16 * 3 * 9 + 16 * 16 * 9 * 2 + 10 * 16
    assert costs.predict((0, 0))["size"] == 4 * (weights + 16 * 3 + 10)
    assert costs.predict((0, 1))["size"] == 4 * (weights + 16 * 3 + 10) - 3 * 10 * 16
    assert costs.predict((1, 0))["size"] == 4 * (8 * 3 * 9 + 8 * 16 * 9 * 2 + 10 * 8 + 8 + 16 + 8 + 10)


def test_memory_is_parameters_and_what_is_alive_at_the_peak():
    """While block0.conv2 runs, its output, its input and the stem's output (the skip) are alive: three tensors of 16 x 8 x 8."""
    space = Space(residual_net(blocks=1, units=16), [Option("width", "block0.conv1", 8, 0.1), Option("block", "block0", 1, 0.1)], TEMPLATE)
    costs = Costs(space, None)
    at = {assignment: costs.predict(assignment) for assignment in ((0, 0), (1, 0), (0, 1))}
    assert at[0, 0]["memory"] - at[0, 0]["size"] == 3 * 4 * 16 * 64
    assert at[1, 0]["memory"] - at[1, 0]["size"] == 4 * (16 + 8 + 16) * 64
    assert at[0, 1]["memory"] - at[0, 1]["size"] == 4 * 16 * 64  # the stem's output


def test_without_tables_macs_stand_for_latency():
    space, _ = made_up()
    costs = Costs(space, None)
    assert costs.quantities == ("macs", "size", "memory") and costs.effort == "macs" and costs.kernels == ()


def test_only_reachable_kernels_are_asked_for_and_once():
    space, costs = made_up(blocks=3, units=32)
    asked = []

    def lookup(kernels):
        asked.append(tuple(kernels))
        return kernel_seconds(kernels)

    Costs(space, lookup)
    assert asked == [costs.kernels] == [reachable_kernels(space)]
    # stem: 4 widths x 2 precisions; first and second convolution of a block: 16 x 2 each, the same in all blocks; pool 4; head 4 x 2;
    # conversions of 4 widths at 8 x 8
    assert len(costs.kernels) == 8 + 32 + 32 + 4 + 8 + 4


def test_fewer_kernels_are_interpolated_between_widths():
    """These times are bilinear in (in, out) and the fixed part is constant, so interpolation is exact."""
    analysis = residual_net(blocks=2, units=128)
    space = Space(analysis, options_of(analysis), TEMPLATE)
    every, few = Costs(space, kernel_seconds), Costs(space, kernel_seconds, most_kernels=60)
    assert len(few.kernels) <= 60 < len(every.kernels)
    for assignment in some(space, 20):
        assert few.predict(assignment)["latency"] == pytest.approx(every.predict(assignment)["latency"], rel=1e-9)


def test_a_kernel_that_could_not_be_measured_takes_the_median_rate_of_its_kind():
    space, _ = made_up(blocks=1, units=16)

    def lookup(kernels):
        return np.asarray([math.nan if k.kind == "conv" and k.output[1] == 8 else 1e-9 * rate(k) for k in kernels])

    def rate(kernel):
        return math.prod(kernel.output) * (math.prod(kernel.weights[0][1:]) if kernel.weights else 1)

    costs = Costs(space, lookup)
    assert costs.unmeasured and all(k.output[1] == 8 for k in costs.unmeasured)
    narrow = space.assignment(TEMPLATE.replace(widths={"block0.conv1": 8}))
    assert costs.shares(narrow)["block0.conv1"] == pytest.approx(1e-9 * 8 * 64 * 16 * 9)


def test_nothing_measured_at_all_still_orders_plans_by_work():
    space, _ = made_up(blocks=1, units=16)
    costs = Costs(space, lambda kernels: np.full(len(kernels), math.nan))
    narrow = space.assignment(TEMPLATE.replace(widths={"block0.conv1": 8}))
    assert 0 < costs.predict(narrow)["latency"] < costs.predict(space.identity)["latency"]


def test_a_depthwise_kernel_has_as_many_groups_as_channels_are_left():
    wide = Size(32, 0, ((("g",), 1),), ((32,),))
    image = (Size(1), wide, Size(8), Size(8))
    attributes = {"stride": [2, 2], "groups": 32, "transposed": False, "kernel_size": (3, 3), "hidden": object(), "eps": 1e-5}
    operator = Operator("dw", "dw", "conv", "w", (image,), image, ((wide, Size(1), Size(3), Size(3)),), attributes, ("relu6",), ("x",))
    assert kernel_of(operator, {"g": 24}, "int8") == Kernel(
        "conv",
        ((1, 24, 8, 8),),
        (1, 24, 8, 8),
        ((24, 1, 3, 3),),
        (("groups", 24), ("stride", (2, 2)), ("transposed", 0)),
        ("relu6",),
        "int8",
    )


def test_the_affine_correction_recovers_an_affine_machine():
    predicted = np.linspace(1e-3, 5e-3, 6)
    fit = Affine.fit(predicted, 2e-4 + 1.3 * predicted)
    assert (fit.offset, fit.slope, fit.n) == (pytest.approx(2e-4), pytest.approx(1.3), 6)
    assert fit.spread == pytest.approx(0, abs=1e-9)
    assert fit.inverse(fit(3e-3)) == pytest.approx(3e-3)


def test_one_point_fits_the_slope_alone_and_none_changes_nothing():
    fit = Affine.fit([2e-3], [3e-3])
    assert (fit.offset, fit.slope) == (0.0, pytest.approx(1.5))
    assert Affine.fit([], [])(7.0) == 7.0
    assert Affine.fit([math.nan, 2e-3], [1e-3, 3e-3]) == fit


def test_measurements_near_the_limit_weigh_most():
    """The machine is 1.0 x below 2 ms and 2.0 x above: near 1 ms the correction must follow the former."""
    predicted = np.array([0.8e-3, 1.0e-3, 1.2e-3, 4e-3])
    measured = predicted * [1.0, 1.0, 1.0, 2.0]
    near = Affine.fit(predicted, measured, near=1e-3)
    assert near(1e-3) == pytest.approx(1e-3, rel=0.03)
    assert abs(Affine.fit(predicted, measured)(1e-3) - 1e-3) > abs(near(1e-3) - 1e-3)


def test_ceilings_from_a_budget():
    original = {"latency": 4e-3, "size": 1000.0, "memory": 5000.0, "macs": 800.0, "energy": 2.0}

    def bounds(batch=4, **limits):
        return ceilings(Budget(**limits).limits, original, batch)

    assert bounds(latency="0.5x") == {"latency": 2e-3}
    assert bounds(latency="1ms", throughput="2x") == {"latency": 1e-3}
    assert bounds(latency="3ms", throughput="2000/s") == {"latency": pytest.approx(2e-3)}
    assert bounds(energy="0.5x", size="0.25x") == {"latency": pytest.approx(2e-3), "size": 250.0}
    assert bounds(macs="0.5x") == {"macs": 400.0}
    assert bounds(macs=100) == {"macs": 400.0}
    with pytest.raises(BudgetError, match="this machine cannot tell"):
        ceilings(Budget(energy="0.5x").limits, {**original, "energy": 0.0}, 1)


def test_one_slow_measurement_at_the_limit_does_not_turn_the_correction():
    predicted = np.array([0.5e-3, 1.0e-3, 2.0e-3, 4e-3])
    measured = predicted * [1.0, 1.4, 1.0, 1.0]
    fit = Affine.fit(predicted, measured, near=1.4e-3)
    assert 1.0 < fit(1e-3) / 1e-3 < 1.3
    assert fit.inverse(1.4e-3) > 1.05e-3


def test_a_trial_in_another_state_of_the_machine_than_all_others_hardly_moves_the_correction():
    """As measured: five plans agree with the tables, and the quickest of all took two thirds of what it takes at other times."""
    parts = 1e-6 * np.array([[500.0, 0.0], [20.0, 250.0], [20.0, 200.0], [60.0, 190.0], [20.0, 160.0]])
    usual = parts @ [1.0, 1.1] + 10e-6
    factors, fit = calibrated(parts, usual * [1, 1, 1, 1, 0.65])
    wanted, found = parts[1:3] @ [1.0, 1.1] + 10e-6, fit(parts[1:3] @ factors)
    assert found == pytest.approx(wanted, rel=0.06)
    assert abs(float(fit(parts[4] @ factors)) / usual[4] - 1) < 0.12


def test_tables_of_one_precision_taken_in_a_slow_minute_are_found_out_by_trials():
    rng = np.random.default_rng(0)
    parts = rng.uniform(0.1e-3, 2e-3, (8, 2))
    measured = 2e-5 + 1.1 * (parts[:, 0] + 0.6 * parts[:, 1])
    assert tilt(parts, measured) == pytest.approx([1.0, 0.6], rel=0.1)
    assert tilt(parts, measured * rng.uniform(0.95, 1.05, 8)) == pytest.approx([1.0, 0.6], rel=0.15)
    fit = Affine.fit(parts @ tilt(parts, measured), measured)
    assert fit.spread < 0.03 < Affine.fit(parts.sum(1), measured).spread


def test_the_original_and_all_int8_tell_most_of_a_tilt_and_one_trial_none():
    parts = np.array([[500e-6, 0.0], [20e-6, 300e-6]])
    assert 0.6 < tilt(parts, [430e-6, 180e-6])[1] < 0.9
    assert tilt(parts[:1], [430e-6]).tolist() == [1.0, 1.0]
    assert tilt(parts * [1, 0], [430e-6, 180e-6]).tolist() == [1.0, 1.0], "nothing in int8: nothing is known of it"


def test_what_int8_is_slower_by_than_the_tables_say_is_no_offset():
    """Two points fit any line exactly: an offset of most of the quickest net is less likely than tables that are off."""
    parts = np.array([[500e-6, 0.0], [20e-6, 300e-6]])
    found = tilt(parts, [430e-6, 400e-6])
    assert 1.25 < found[1] < 1.7
    fit = Affine.fit(parts @ found, [430e-6, 400e-6], is_by_tables=True)
    assert fit.offset < 80e-6
    assert Affine.fit(parts.sum(1), [430e-6, 400e-6]).offset > 300e-6, "where nothing is known of the offset, it is what the points say"


def test_parts_by_precision_sum_to_the_prediction_and_tilt_the_row():
    space, costs = made_up(blocks=2)
    assert costs.precisions == ("fp32", "int8")
    factors = np.array([1.0, 0.5])
    problem = Problem(space.sizes, {"latency": costs.tilted(factors)})
    for assignment in some(space, 20):
        parts = costs.parts(assignment)
        assert parts.sum() == pytest.approx(costs.predict(assignment)["latency"], rel=1e-9)
        assert problem.values(space.canonical(assignment))[0] == pytest.approx(float(parts @ factors), rel=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_masks_save_the_bytes_that_a_file_saves_and_no_time(precision):
    """A bit for each of 32 x 32 x 9 weights and the values of those that stay; no latency, no MACs, no memory."""
    analysis = residual_net(blocks=2, units=32)
    masks = [Option("mask", "block0.conv1", pattern, 0.1) for pattern in ("10%", "50%", "2:4", "90%")]
    space = Space(analysis, [*options_of(analysis), *masks], TEMPLATE)
    costs = Costs(space, kernel_seconds)
    each = {"fp32": 4, "int8": 1}[precision]

    def predicted(pattern: str | None, width: int) -> dict[str, float]:
        plan = TEMPLATE.replace(
            widths={} if width == 32 else {"block0.conv1": width},
            precisions={} if precision == "fp32" else {"block0.conv1": "int8"},
            masks={} if pattern is None else {"block0.conv1": pattern},
        )
        return costs.predict(space.assignment(plan))

    for width in (32, 16):
        count, dense = width * 32 * 9, predicted(None, width)
        for pattern, gone in (("50%", 144), ("2:4", 144), ("90%", 259)):
            found = predicted(pattern, width)
            assert dense["size"] - found["size"] == pytest.approx(count * each - (count / 8 + (count - gone * width) * each))
            assert {q: v for q, v in found.items() if q not in ("size", "loss")} == {
                q: v for q, v in dense.items() if q not in ("size", "loss")
            }
        assert predicted("10%", width)["size"] == dense["size"], "no credit where the file is not smaller"


def test_a_limit_on_the_size_is_solved_with_masks():
    """What a small limit leaves: with masks the size is met at a loss that widths and blocks alone exceed."""
    analysis = residual_net(blocks=2, units=32)
    options = [Option("width", name, 8, 5.0) for name in analysis.groups]
    masks = [Option("mask", name, "75%", 0.01) for name in analysis.operators if analysis.operators[name].kind == "conv"]
    space = Space(analysis, [*options, *masks], TEMPLATE)
    costs = Costs(space, kernel_seconds)
    limit = 0.4 * costs.predict(space.identity)["size"]
    plan = Solver(space, costs, Limits({"size": limit})).ask(1)[0]
    assert plan.masks and not plan.widths
    assert costs.predict(space.assignment(plan))["size"] <= limit


def test_costs_of_heads_and_places_together_are_those_of_the_pruned_net():
    graph = capture(*nets.bert(1))
    analysis = analyse(graph)
    layer = "bert.encoder.layer.0.attention.self"
    levels = {
        f"{layer}.query": (2, 1),
        f"{layer}.query.size": (9, 4),
        f"{layer}.value.size": (10, 3),
        "bert.embeddings.word_embeddings": (24,),
    }
    space = Space(analysis, [Option("width", name, width, 0.1) for name, widths in levels.items() for width in widths], TEMPLATE)
    costs = Costs(space, None)
    for assignment in some(space, 12):
        widths = space.plan(assignment).widths
        removed = {name: list(range(width, analysis.groups[name].units)) for name, width in widths.items()}
        pruned = prune(graph, analysis, removed).graph
        found = costs.predict(assignment)
        assert found["macs"] == macs(analyse(pruned))
        gone = costs.predict(space.identity)["size"] - found["size"]
        bytes_of = [sum(4 * p.numel() for p in one.module.parameters()) for one in (graph, pruned)]
        assert gone == bytes_of[0] - bytes_of[1]


def test_the_price_of_widths_between_levels_is_a_product_where_groups_cross():
    graph = capture(*nets.bert(1))
    analysis = analyse(graph)
    heads, places = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "query.size"))
    space = Space(analysis, [Option("width", heads, 1, 0.1), Option("width", places, 2, 0.1)], TEMPLATE)
    price = soft_price(Costs(space, None), TEMPLATE, "macs")
    full = macs(analysis, {heads: 4, places: 12})
    for h, s in ((4.0, 7.0), (2.5, 12.0), (2.5, 7.0), (1.0, 2.0)):
        each = [macs(analysis, {heads: a, places: b}) for a in (1, 4) for b in (2, 12)]
        x, y = (h - 1) / 3, (s - 2) / 10
        wanted = (1 - x) * ((1 - y) * each[0] + y * each[1]) + x * ((1 - y) * each[2] + y * each[3])
        assert price({heads: torch.tensor(h), places: torch.tensor(s)}).item() == pytest.approx(wanted)
    assert price({}).item() == full


def test_an_operator_of_many_groups_leaves_the_others_their_levels():
    """A fused projection depends on the stream, on heads and on two sizes of them; what is in the feed-forward keeps all widths."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o, self.f1, self.f2 = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (8, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.f2(F.relu(self.f1(x)))

    analysis = analyse(capture(nn.Sequential(nn.Linear(6, 64), Block(), Block(), nn.Linear(64, 3)).eval(), (torch.randn(2, 16, 6),)))
    widths = [
        Option("width", name, width, 0.1) for name, group in analysis.groups.items() for width in range(1, group.units, group.units // 8)
    ]
    space = Space(analysis, widths, Plan("made-up:cpu"))
    terms = terms_of(space)
    found = {term.name: grid for term, grid in zip(terms, grids(terms, 500), strict=True)}
    assert len({kernel for term in terms for kernel in term.kernels(found[term.name])}) <= 500
    inner = space.index["width", "1.f1"]
    assert len(found["1.f1"][inner]) == space.sizes[inner]
    assert all(len(values) < space.sizes[v] for v, values in found["1.qkv"].items())
    assert all(values[0] == 0 and values[-1] == space.sizes[v] - 1 for grid in found.values() for v, values in grid.items())


def test_the_quickest_scheme_leaves_out_what_it_makes_slower():
    net = residual_net()
    linear_is_slower = lambda kernels: np.asarray(  # noqa: E731
        [
            seconds * (30.0 if k.precision == "int8" and k.kind == "linear" else 1.0)
            for k, seconds in zip(kernels, kernel_seconds(kernels), strict=True)
        ]
    )
    options = [Option("precision", name, scheme, 0.1) for name, o in net.operators.items() if o.weights for scheme in ("bf16", "int8")]
    space = Space(net, options, TEMPLATE)
    for lookup, left_out in ((kernel_seconds, set()), (linear_is_slower, {"linear"})):
        chosen = Costs(space, lookup).quickest_scheme()
        assert chosen is not None
        plan = space.plan(chosen)
        assert set(plan.precisions.values()) == {"int8"}
        assert set(plan.precisions) == {o.subject for o in options if net.operators[o.subject].kind not in left_out}
    assert Costs(space, lambda kernels: np.asarray([1.0 if k.precision == "fp32" else 9.0 for k in kernels])).quickest_scheme() is None
    assert Costs(space, None).quickest_scheme() is None

"""Decisions and plans: both ways, canonical, with options that do not fit refused by name."""

from __future__ import annotations

import itertools
import math

import pytest

from planish.errors import PlanError, UnknownName, UsageError
from planish.graph.graph import Block
from planish.plan import Option, Plan
from planish.search.lagrangian import Problem
from planish.search.space import Space
from planish.testing.search import options_of, residual_net

TEMPLATE = Plan(target="made-up:cpu", saliency="taylor", seed=7)


@pytest.fixture
def space():
    analysis = residual_net(blocks=2, units=32)
    return Space(analysis, options_of(analysis), TEMPLATE)


def test_variables_are_what_the_options_offer(space):
    assert [(v.technique, v.subject) for v in space.variables] == [
        ("width", "stem"),
        ("width", "block0.conv1"),
        ("width", "block1.conv1"),
        ("block", "block0"),
        ("block", "block1"),
        *(("precision", name) for name in ("stem", "block0.conv1", "block0.conv2", "block1.conv1", "block1.conv2", "head")),
    ]
    assert space.variables[0].values == (32, 24, 16, 8) and space.variables[3].values == (0, 1)
    assert space.variables[5].values == ("fp32", "int8")
    assert all(v.losses[0] == 0 for v in space.variables)


def test_plan_and_assignment_are_inverse_and_keep_the_template(space):
    assignment = (1, 2, 0, 0, 1, 1, 0, 1, 0, 0, 1)
    plan = space.plan(assignment)
    assert plan == TEMPLATE.replace(
        widths={"stem": 24, "block0.conv1": 16},
        blocks=("block1",),
        precisions={"stem": "int8", "block0.conv2": "int8", "head": "int8"},
    )
    assert space.assignment(plan) == assignment
    assert space.plan(assignment, seed=9).seed == 9
    assert space.plan(space.identity).is_identity


def test_a_removed_block_takes_its_decisions_with_it(space):
    inside = (0, 0, 3, 0, 1, 0, 0, 0, 1, 1, 0)
    assert space.canonical(inside) == (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert space.plan(inside) == TEMPLATE.replace(blocks=("block1",))
    problem = Problem(space.sizes, {"loss": space.losses()})
    assert problem.values(inside)[0] == pytest.approx(space.variables[4].losses[1])


def test_losses_add_up_for_every_canonical_assignment(space):
    problem = Problem(space.sizes, {"loss": space.losses()})
    for assignment in itertools.islice(space.all(), 0, None, 17):
        want = sum(v.losses[i] for v, i in zip(space.variables, assignment, strict=True))
        assert problem.values(assignment)[0] == pytest.approx(want)


def test_a_block_inside_a_removed_block_is_irrelevant():
    analysis = residual_net(blocks=2)
    blocks = dict(analysis.blocks)
    names = (*blocks["block0"].operators, *blocks["block1"].operators)
    blocks["both"] = Block("both", "n", "s", names, ())
    nested = Space(
        type(analysis)(analysis.groups, blocks, analysis.operators, {}, {}),
        [Option("block", name, 1, 1.0) for name in blocks],
        TEMPLATE,
    )
    assert nested.plan((1, 1, 1)).blocks == ("both",)
    assert len(list(nested.all())) == 5


def test_a_narrower_width_never_loses_less_and_infinite_losses_are_not_offered():
    analysis = residual_net(blocks=1)
    options = [
        Option("width", "stem", 24, 0.5),
        Option("width", "stem", 16, 0.3),
        Option("width", "stem", 8, math.inf),
        Option("block", "block0", 1, math.nan),
    ]
    space = Space(analysis, options, TEMPLATE)
    assert [(v.subject, v.values, v.losses) for v in space.variables] == [("stem", (32, 24, 16), (0.0, 0.5, 0.5))]


@pytest.mark.parametrize(
    ("option", "error", "said"),
    [
        (Option("width", "stemm", 8, 0.1), UnknownName, "no group named 'stemm'; did you mean 'stem'"),
        (Option("block", "block9", 1, 0.1), UnknownName, "no block named 'block9'"),
        (Option("precision", "os.system", "int8", 0.1), UnknownName, "no operator named 'os.system'"),
        (Option("width", "stem", 33, 0.1), PlanError, r"width of 'stem' must be in \[1, 32\]; got 33"),
        (Option("width", "stem", 0, 0.1), PlanError, r"must be in \[1, 32\]; got 0"),
        (Option("rank", "stem", 3, 0.1), PlanError, "technique must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(option, error, said):
    with pytest.raises(error, match=said):
        Space(residual_net(), [option], TEMPLATE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widths": {"nowhere": 8}}, "width 8 of 'nowhere' is not an option of this graph; offered: nothing"),
        ({"widths": {"stem": 13}}, "width 13 of 'stem' is not an option of this graph; offered: 32, 24, 16, 8"),
        ({"precisions": {"stem": "int4"}}, "precision 'int4' of 'stem' is not an option"),
        ({"blocks": ("stem",)}, "block 1 of 'stem' is not an option"),
    ],
)
def test_plans_that_do_not_fit_are_refused(space, changes, said):
    with pytest.raises(PlanError, match=said):
        space.assignment(TEMPLATE.replace(**changes))


def with_masks(**changes):
    analysis = residual_net(blocks=2, units=32)
    masks = [
        Option("mask", name, pattern, loss) for name in ("stem", "block0.conv1", "head") for pattern, loss in (("50%", 0.1), ("2:4", 0.2))
    ]
    return Space(analysis, [*options_of(analysis), *masks], TEMPLATE.replace(**changes))


def test_masks_are_decisions_of_operators_that_go_with_their_blocks():
    space = with_masks(masking="wanda")
    number = space.index["mask", "block0.conv1"]
    assert space.variables[number].values == ("none", "50%", "2:4") and space.variables[number].losses == (0.0, 0.1, 0.2)
    chosen = [0] * len(space.variables)
    chosen[number], chosen[space.index["mask", "head"]] = 1, 2
    plan = space.plan(chosen)
    assert plan.masks == {"block0.conv1": "50%", "head": "2:4"} and plan.masking == "wanda"
    assert not plan.is_identity and not plan.is_dense
    assert space.assignment(plan) == tuple(chosen)
    chosen[space.index["block", "block0"]] = 1
    assert space.plan(chosen).masks == {"head": "2:4"}
    with pytest.raises(PlanError, match="mask '90%' of 'head' is not an option of this graph; offered: none, 50%, 2:4"):
        space.assignment(TEMPLATE.replace(masks={"head": "90%"}))


def test_a_pattern_that_makes_no_sense_is_no_option():
    with pytest.raises(UsageError, match="a pattern is a share of zeros, as 75%"):
        Space(residual_net(), [Option("mask", "stem", "most", 0.1)], TEMPLATE)

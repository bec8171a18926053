"""What a pursuit decides by itself: how many kernels it asks for, and when it aims closer to the limits."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from planish.budget import Budget
from planish.measurement import Estimate
from planish.offers import Offers
from planish.pursuit import Pursuit
from planish.study.store import Meta, Study
from planish.workbench import Workbench


def test_a_study_keeps_how_many_kernels_were_asked_for(tmp_path: Path) -> None:
    """A run that is carried on without a limit must predict what it predicted before, or it goes another way."""
    counts = []
    with Study.create(tmp_path / "net.study", Meta({}, Budget(latency="0.5x"), {}, seed=0, machine="m")) as study:
        for left in (300.0, math.inf, 20.0):
            offers = object.__new__(Offers)
            offers.study, offers.clock = study, SimpleNamespace(left_s=left)  # type: ignore[assignment]
            counts.append(offers.affordable_kernels)
    assert counts[0] == counts[1] == counts[2] < 600


def test_without_a_limit_on_time_every_kernel_is_asked_for(tmp_path: Path) -> None:
    with Study.create(tmp_path / "net.study", Meta({}, Budget(latency="0.5x"), {}, seed=0, machine="m")) as study:
        offers = object.__new__(Offers)
        offers.study, offers.clock = study, SimpleNamespace(left_s=math.inf)  # type: ignore[assignment]
        assert offers.affordable_kernels == 600


@pytest.mark.parametrize(
    ("expected", "is_out_of_reach"),
    [
        ({"quick": 0.018, "quicker": 0.03}, True),
        ({"quick": 0.014, "quicker": 0.03}, False),
        ({"quick": 0.018, "slow": 0.001}, True),
        ({"slow": 0.001}, False),
        ({"quick": None}, False),
    ],
)
def test_an_aim_is_out_of_reach_where_all_that_may_hold_it_loses_far_too_much(
    expected: dict[str, float | None], is_out_of_reach: bool
) -> None:
    class Pretended(Pursuit):
        allowed_drop = 0.01

        def may_hold_aim(self, plan: str) -> bool:  # type: ignore[override]
            return plan != "slow"

    pursuit = object.__new__(Pretended)
    pursuit.request = SimpleNamespace(trials=8)  # type: ignore[assignment]
    pursuit.search = SimpleNamespace(best=lambda n: list(expected), expected_drop=expected.get)  # type: ignore[assignment]
    assert pursuit._is_out_of_reach() is is_out_of_reach


def test_a_first_minute_that_was_slow_is_not_what_the_original_usually_takes() -> None:
    def timing(seconds: float) -> SimpleNamespace:
        return SimpleNamespace(latency_s=Estimate(seconds, seconds, seconds, 9))

    bench = object.__new__(Workbench)
    bench._originals = []
    bench.baselines = {"openvino": SimpleNamespace(timing=timing(750e-6))}  # type: ignore[dict-item]
    assert bench.is_as_usual(timing(740e-6)) and not bench.is_as_usual(timing(520e-6))
    for seconds in (520e-6, 530e-6, 700e-6, 515e-6):
        bench.noticed(timing(seconds))
    assert bench.is_as_usual(timing(520e-6)) and not bench.is_as_usual(timing(740e-6))

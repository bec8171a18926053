"""What a verdict says of figures, without a run."""

from __future__ import annotations

import pytest

import planish
from making import measurement
from planish.measurement import Estimate
from planish.verdict import Course, Held, _texts, judge_budget, unmet


@pytest.mark.parametrize(
    ("limit", "ratio", "said"),
    [
        ({"latency": "0.3x"}, 0.30041, "latency 0.3004x, the limit is 0.3x"),
        ({"latency": "0.3x"}, 0.4, "latency 0.4x, the limit is 0.3x"),
        ({"latency": "2ms"}, 0.5, "latency 5.2 ms, the limit is 2 ms"),
        ({"throughput": "300/s"}, 0.5, "throughput 192/s, the limit is 300/s"),
        ({"size": "1MB"}, 0.5, "size 2 MB, the limit is 1 MB"),
        ({"size": "1.999999MB"}, 0.5, "size 2.000001 MB, the limit is 1.999999 MB"),
        ({"macs": "1M"}, 0.5, "macs 3 million, the limit is 1 million"),
    ],
)
def test_a_limit_that_is_missed_is_told_from_the_figure_in_its_own_unit(limit: dict[str, str], ratio: float, said: str) -> None:
    seconds = Estimate(5.2e-3, 5.2e-3, 5.2e-3, 20)
    before = measurement(latency_s=seconds, size_bytes=4_000_000, macs=6_000_000)
    after = measurement(latency_s=seconds, size_bytes=2_000_001, macs=3_000_000)
    budget = planish.Budget(**limit, drop=0.5)
    verdict, reason = judge_budget(budget, before, after, Estimate(ratio, ratio, ratio, 20), 0.0, None, is_original=False)
    assert (verdict, reason) == ("infeasible", f"nothing found holds the budget; nearest: {said}")


@pytest.mark.parametrize(
    ("missed", "course", "said"),
    [
        (["latency"], Course(), "nothing found holds the budget; nearest: latency ..."),
        (["latency"], Course(60.0, 20, 20, False, False, 0, 500), "nothing found holds the budget; nearest: latency ..."),
        (["latency"], Course(60.0, 1, 20, True, False, 0, 500), "nothing found holds the budget; nearest: latency ..."),
        (["drop"], Course(60.0, 20, 20, False, True, 500, 500), "nothing found holds the budget; nearest: drop ..."),
        (["drop"], Course(None, 20, 20, False, True, 100, 500), "nothing found holds the budget; nearest: drop ..."),
        (
            ["latency", "size"],
            Course(None, 20, 20, False, True),
            (
                "nothing that was tried holds the budget, though the tables say that a plan should hold the limit on latency and size; "
                "nearest: latency ...; size ..."
            ),
        ),
        (
            ["latency"],
            Course(60.0, 1, 20, True, True, 0, 500),
            (
                "not met within the time limit of 60 s; a longer one may: 1 of at most 20 plans was tried, and the tables say that a plan should "
                "hold the limit on latency; nearest: latency ..."
            ),
        ),
        (
            ["latency", "drop"],
            Course(90.5, 2, 20, True, None, 0, 500),
            "not met within the time limit of 90.5 s; a longer one may: 2 of at most 20 plans were tried; nearest: latency ...; drop ...",
        ),
        (
            ["drop"],
            Course(60.0, 2, 20, True, True, 0, 500),
            (
                "not met within the time limit of 60 s; a longer one may: 2 of at most 20 plans were tried, and no time was left for recovery; "
                "nearest: drop ..."
            ),
        ),
        (
            ["drop"],
            Course(60.0, 20, 20, False, True, 120, 500),
            (
                "not met within the time limit of 60 s; a longer one may: recovery saw 120 of the 500 samples that it sees without one; "
                "nearest: drop ..."
            ),
        ),
    ],
)
def test_a_time_that_was_too_short_is_not_what_cannot_be_met(missed: list[str], course: Course, said: str) -> None:
    found = [Held("macs"), *(Held(quantity, "missed", f"{quantity} ...") for quantity in missed)]
    assert unmet(found, course) == (said, said.startswith("not met within"))


def test_noise_is_told_in_the_limit_s_unit() -> None:
    seconds = Estimate(2.1e-3, 1.9e-3, 2.4e-3, 20, trustworthy=False)
    verdict, reason = judge_budget(
        planish.Budget(latency="2ms", drop=0.5), measurement(), measurement(latency_s=seconds), seconds, 0.0, None, is_original=False
    )
    assert (verdict, reason) == ("undecided", "latency 2.1 ms, between 1.9 ms and 2.4 ms: the machine is too noisy to tell")


def test_a_figure_and_what_it_lies_between_have_the_same_digits() -> None:
    ratio = Estimate(0.39941, 0.39938, 0.4002, 20, trustworthy=False)
    _, reason = judge_budget(planish.Budget(latency="0.4x", drop=0.5), measurement(), measurement(), ratio, 0.0, None, is_original=False)
    assert reason.startswith("latency 0.39941x, between 0.39938x and 0.4002x")


@pytest.mark.parametrize(
    ("limit", "value", "beside", "said"),
    [
        ({"size": "1200MB"}, 1.43e9, 1.2e9, "1430 MB"),
        ({"size": "1000MB"}, 1_000_000_001, 1e9, "1000.000001 MB"),
        ({"throughput": "3000/s"}, 2104.0, 3000.0, "2100/s"),
        ({"macs": "2000M"}, 3.82e9, 2e9, "3820 million"),
        ({"latency": "1x"}, float("inf"), 1.0, "infx"),
    ],
)
def test_figures_are_written_out(limit: dict[str, str], value: float, beside: float, said: str) -> None:
    (wanted,) = planish.Budget(**limit).limits
    assert _texts(wanted, value, beside)[0] == said


def test_a_speed_that_noise_blurs_is_said_with_its_bounds() -> None:
    seconds = measurement()
    for is_sure, said in ((True, "2.00 times as fast as the"), (False, "2.00 times as fast (1.60 to 2.50: the machine is noisy) as the")):
        ratio = Estimate(0.5, 0.4, 0.625, 20, is_sure)
        verdict, reason = judge_budget(planish.Budget(drop=0.5), seconds, seconds, ratio, 0.0, None, is_original=False)
        assert verdict == "met" and reason.startswith(said), reason

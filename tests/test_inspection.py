"""What `inspect` says of a net: shares against closed forms, and why widths stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inspecting
import planish
import small_jobs
from planish import flow
from planish.report import figures, terminal


def test_shares_are_what_would_go_with_all_units() -> None:
    data = inspecting.found()
    (group,) = [group for group in data["groups"] if group["name"] == "first"]
    first, norm, second = 8 * 12 * 9 + 12, 24, 12 * 8 * 9 + 8
    parameters = (3 * 8 * 9 + 8) + first + norm + second + 2 * (8 * 6 + 6) + (12 * 5 + 5)
    assert data["parameters"] == parameters
    assert group["share_of_parameters"] == pytest.approx((first + norm + second - 8) / parameters), "the second's bias is another group's"
    inside, outside = 2 * 8 * 12 * 9 * 64, 3 * 8 * 9 * 64 + 2 * 8 * 6 * 64 + 12 * 5
    assert data["macs"] == inside + outside
    assert group["share_of_macs"] == pytest.approx(inside / (inside + outside))
    assert data["blocks"][0]["share_of_macs"] == pytest.approx(inside / (inside + outside))
    assert (group["units"], group["unit"]) == (12, "channels")


def test_each_member_says_what_it_is_and_along_which_dimension() -> None:
    (group,) = [group for group in inspecting.found()["groups"] if group["name"] == "first"]
    assert {(member["tensor"], member["dimension"], member["role"], member["indices"]) for member in group["members"]} == {
        ("first.weight", 0, "out", 12),
        ("first.bias", 0, "out", 12),
        *(("norm." + leaf, 0, "affine", 12) for leaf in ("weight", "bias", "running_mean", "running_var")),
        ("second.weight", 1, "in", 12),
    }


def test_why_a_width_stays_is_said() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.LayerNorm(10))
    job = planish.Workload(model=net.eval(), example_inputs=(x[:1],), calibration=[x], metric="agreement", name="net")
    data = flow.inspect(job).to_json()
    assert [operator["width"] for operator in data["operators"]] == [
        "can be pruned",
        "it is the program's output",
        "is as wide as what it reads",
    ]
    kept = flow.inspect(job, keep=("0.*",)).to_json()
    assert kept["operators"][0]["width"] == "keep=0.*"
    assert kept["groups"][0]["pinned"] == "keep=0.*"


@pytest.mark.parametrize(("limit", "most"), [(None, "at most 25 min 00 s"), (300.0, "at most ")])
def test_a_plan_of_work_says_that_recovery_s_time_is_a_cap(limit: float | None, most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    data = flow.dry_run(small_jobs.stripes_job(), "onnxruntime:cpu", planish.Budget(latency="0.5x", drop=0.3), time_limit=limit).to_json()
    assert data["at_most"] == ["recovery"]
    estimated = sum(seconds for name, seconds in data["stages"].items() if name != "recovery")
    said = terminal.work_plan_text(data)
    assert f"about {figures.duration(estimated)}, and {most}" in said and "of recovery" in said
    assert f"  {most}" in said.partition("stage")[2], "the row of the table says so too"
    without = flow.dry_run(small_jobs.stripes_job(), "onnxruntime:cpu", planish.Budget(latency="0.5x"), techniques=("prune",)).to_json()
    assert without["at_most"] == [] and "at most" not in terminal.work_plan_text(without)

"""What a pursuit decides by itself: how many kernels it asks for, and when it aims closer to the limits."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

from planish.budget import Budget
from planish.pursuit import Pursuit
from planish.study.store import Meta, Study


def test_a_study_keeps_how_many_kernels_were_asked_for(tmp_path: Path) -> None:
    """A run that is carried on without a limit must predict what it predicted before, or it goes another way."""
    counts = []
    with Study.create(tmp_path / "net.study", Meta({}, Budget(latency="0.5x"), {}, seed=0, machine="m")) as study:
        for left in (300.0, math.inf, 20.0):
            pursuit = object.__new__(Pursuit)
            pursuit.study, pursuit.clock = study, SimpleNamespace(left_s=left)
            counts.append(pursuit._affordable_kernels)
    assert counts[0] == counts[1] == counts[2] < 600


def test_without_a_limit_on_time_every_kernel_is_asked_for(tmp_path: Path) -> None:
    with Study.create(tmp_path / "net.study", Meta({}, Budget(latency="0.5x"), {}, seed=0, machine="m")) as study:
        pursuit = object.__new__(Pursuit)
        pursuit.study, pursuit.clock = study, SimpleNamespace(left_s=math.inf)
        assert pursuit._affordable_kernels == 600

"""What the benchmarks that optimize have in common: their options, and the run that writes an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import planish
from planish.console import Console


def optimized(job: planish.Workload, out: Path, arguments: argparse.Namespace, **more: Any) -> planish.Result:
    """The run that the usual options ask for, shown on the console; the nearest net is written where nothing holds the budget.

    Args:
        job: what is made faster.
        out: where the artifact goes.
        arguments: with `latency`, `drop`, `time_limit`, `threads` and `seed`.
        more: arguments of `planish.optimize`.
    """
    with Console().running() as console:
        return planish.optimize(
            job,
            budget=planish.Budget(latency=arguments.latency, drop=arguments.drop),
            out=out,
            time_limit=arguments.time_limit,
            threads=arguments.threads,
            seed=arguments.seed,
            overwrite=True,
            accept_nearest=True,
            events=console,
            **more,
        )

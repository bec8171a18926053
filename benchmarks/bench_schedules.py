"""Schedules on a CIFAR ResNet: every way for units to leave, in as much time, at the same share of the MACs.

python benchmarks/bench_schedules.py --data DIR --macs 0.5x --time-limit 300
python benchmarks/bench_schedules.py --data DIR --only one-shot growth --seeds 3

Each line is a whole run of `optimize` that may prune and distil (no int8): the same search, then the schedule and recovery share
the time that is left. Drops are in points on the test images, measured on the artifact, with the paired 95 % interval.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cifar

import planish
from planish import registry


def main() -> None:
    """Print a line for every schedule and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--macs", default="0.5x")
    parser.add_argument("--drop", default="10pt", help="a loose one: the runs are compared by what they lose")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of each run")
    parser.add_argument("--only", nargs="+", default=registry.names("schedule"), help="schedules")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()

    job = cifar.job(arguments.depth, cifar.data_folder(arguments.data))
    for seed in range(arguments.seeds):
        for name in arguments.only:
            out = Path(tempfile.mkdtemp(prefix="planish-bench-")) / "net.planish"
            result = planish.optimize(
                job,
                budget=planish.Budget(macs=arguments.macs, drop=arguments.drop),
                out=out,
                techniques=("prune", "distill"),
                schedule=name,
                time_limit=arguments.time_limit,
                threads=arguments.threads,
                seed=seed,
            )
            found = result.summary
            assert found.plan is not None and found.drop is not None and found.drop_interval is not None
            drop, low, high = (100 * value for value in (found.drop, *found.drop_interval))
            print(
                f"ResNet-{arguments.depth} {name:20s} seed {seed}: MACs {found.ratios['macs'].median:.3f}x  drop {drop:+.2f} ({low:+.2f} to "
                f"{high:+.2f})  {found.verdict}, {found.plan.recovery.samples} images, {found.seconds['total']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

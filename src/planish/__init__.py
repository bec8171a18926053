"""planish: a trained net, some data and a budget in; an artifact that meets the budget where it will run, with the proof, out.

Importing this package loads neither torch nor a runtime: every public name is brought in when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Workload": "planish.workload",
    "Budget": "planish.budget",
    "Target": "planish.target",
    "Plan": "planish.plan",
    "Option": "planish.plan",
    "Recovery": "planish.plan",
    "Estimate": "planish.measurement",
    "Measurement": "planish.measurement",
    "Outcome": "planish.measurement",
    "Result": "planish.result",
    "PlanishError": "planish.errors",
    "Artifact": "planish.artifact",
    "load": "planish.artifact",
    "optimize": "planish.flow",
    "resume": "planish.flow",
    "shrink": "planish.streaming.shrink",
    "verify": "planish.verification",
}
__all__ = [
    "Artifact",
    "Budget",
    "Estimate",
    "Measurement",
    "Option",
    "Outcome",
    "Plan",
    "PlanishError",
    "Recovery",
    "Result",
    "Target",
    "Workload",
    "__version__",
    "load",
    "optimize",
    "resume",
    "shrink",
    "verify",
]

if TYPE_CHECKING:
    from planish.artifact import Artifact as Artifact
    from planish.artifact import load as load
    from planish.budget import Budget as Budget
    from planish.errors import PlanishError as PlanishError
    from planish.flow import optimize as optimize
    from planish.flow import resume as resume
    from planish.measurement import Estimate as Estimate
    from planish.measurement import Measurement as Measurement
    from planish.measurement import Outcome as Outcome
    from planish.plan import Option as Option
    from planish.plan import Plan as Plan
    from planish.plan import Recovery as Recovery
    from planish.result import Result as Result
    from planish.streaming.shrink import shrink as shrink
    from planish.target import Target as Target
    from planish.verification import verify as verify
    from planish.workload import Workload as Workload


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

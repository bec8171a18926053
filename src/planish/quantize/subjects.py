"""Which operators a precision plan speaks of, checked by name."""

from __future__ import annotations

from collections.abc import Mapping

from planish.errors import PlanError, UnknownName
from planish.graph.graph import Analysis

SCHEMES = ("fp32", "int8")


def chosen_nodes(analysis: Analysis, precisions: Mapping[str, str]) -> dict[str, str]:
    """Operator name -> fx node name, in the order of the program, of the operators that are to be int8.

    Raises:
        UnknownName: an operator that the analysis has not.
        PlanError: a precision that is neither "int8" nor "fp32".
    """
    for name, scheme in precisions.items():
        if name not in analysis.operators:
            raise UnknownName("operator", name, analysis.operators)
        if scheme not in SCHEMES:
            raise PlanError(f"precisions: the scheme of {name!r} must be 'fp32' or 'int8'; got {str(scheme)[:40]!r}")
    return {name: found.node for name, found in analysis.operators.items() if precisions.get(name) == "int8"}

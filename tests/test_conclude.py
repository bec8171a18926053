"""What a conclusion says beside its figures."""

from __future__ import annotations

import pytest

import making
from planish.conclude import _said
from planish.measurement import Proof
from planish.result import OperatorRow


@pytest.mark.parametrize(
    ("precisions", "kernels", "planned"),
    [
        (["int8", "int8-dynamic", "w4a8", "fp32"], 2, 3),
        (["int8", "int8-dynamic", "w4a8", "fp32"], 3, None),
        (["int8-weights", "int4-weights", "removed"], 0, None),  # turned to float before they are multiplied
        (["int8", "int8-weights"], 0, 1),
    ],
)
def test_operators_that_were_to_run_in_int8_are_those_whose_activations_are_rounded(
    precisions: list[str], kernels: int, planned: int | None
) -> None:
    operators = tuple(OperatorRow(name=f"{i}", kind="linear", precision=precision) for i, precision in enumerate(precisions))
    measured = making.measurement(proof=Proof("CPU", {}, {}, kernels, 1))
    found = [said for said in _said(making.summary(operators=operators, optimized=measured)) if "were to run in int8" in said]
    wanted = [] if planned is None else [f"{planned} operators were to run in int8, and the runtime says that {kernels} kernels do"]
    assert found == wanted

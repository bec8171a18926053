"""Which schemes a run tries, offers and uses, and which it refuses before anything is done. Latency follows the size of the exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nets
import planish
import replaying
import small_jobs
from planish.errors import UnknownName, UsageError

PARTS = {"train": 64, "validation": 16, "test": 16}


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)


def sentences() -> planish.Workload:
    """A small BERT on random tokens, judged by how near its answers are to the original's."""
    model, example = nets.bert()
    parts = {part: [(nets.resized(example, n, seed=seed), None)] for seed, (part, n) in enumerate(PARTS.items())}
    return planish.Workload(model=model, example_inputs=nets.resized(example, 1), metric="cosine", name="sentences", **parts)


def run(job: planish.Workload, out: Path, budget: planish.Budget, **changes: Any) -> planish.Result:
    arguments: dict[str, Any] = {"trials": 2, "threads": 1, "techniques": ("quantize",), "target": "onnxruntime:cpu"}
    arguments |= changes
    return planish.optimize(job, arguments.pop("target"), budget, out, **arguments)


def used(result: planish.Result) -> set[str]:
    assert result.plan is not None
    return set(result.plan.precisions.values())


def test_all_that_the_runtime_executes_is_tried_and_the_search_mixes_it(tmp_path: Path) -> None:
    result = run(sentences(), tmp_path / "net.planish", planish.Budget(drop=0.2))
    assert result.verdict == "met"
    tried = {scheme for trial in result.summary.trials for scheme in trial.plan.precisions.values()}
    assert {"int8", "int8-dynamic", "int8-weights"} <= tried
    assert used(result) <= tried
    words = {row.precision for row in result.summary.operators}
    assert words <= {"fp32", *tried}


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weights", "w4a8"])
def test_only_what_was_named_is_used(scheme: str, tmp_path: Path) -> None:
    result = run(sentences(), tmp_path / "net.planish", planish.Budget(drop=0.2), schemes=(scheme,))
    assert used(result) == {scheme}
    x = nets.resized(nets.bert()[1], 3, seed=9)
    loaded = planish.load(tmp_path / "net.planish")(x)
    torch.testing.assert_close(loaded["logits"], result.module(x)["logits"], atol=1e-2, rtol=1e-2)


def test_int4_is_tried_under_a_limit_on_the_size_alone(tmp_path: Path) -> None:
    result = run(sentences(), tmp_path / "net.planish", planish.Budget(size="0.6x", drop=0.5))
    tried = {scheme for trial in result.summary.trials for scheme in trial.plan.precisions.values()}
    assert "int4-weights" in tried


def test_a_linear_map_at_the_end_is_no_reason_to_try_dynamic_ranges(tmp_path: Path) -> None:
    result = run(small_jobs.stripes_job(), tmp_path / "net.planish", planish.Budget(drop=0.5))
    assert {s for trial in result.summary.trials for s in trial.plan.precisions.values()} == {"int8"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schemes": ("fp8",)}, UsageError, "'fp8' cannot run on 'onnxruntime:cpu': no processor multiplies 8-bit floats"),
        ({"schemes": ("bf16",)}, UsageError, "'bf16' cannot run on 'onnxruntime:cpu': onnxruntime cannot execute it"),
        ({"schemes": ("int8-dynamic",), "target": "openvino:cpu"}, UsageError, "'int8-dynamic' cannot run on 'openvino:cpu'"),
        ({"schemes": ("int9",)}, UnknownName, "no scheme named 'int9'; did you mean 'int8'"),
        ({"schemes": ()}, UsageError, "give at least one of bf16, "),
        ({"schemes": ("int8",), "techniques": ("prune",)}, UsageError, "that needs the technique quantize"),
        ({"observer": "entropie"}, UnknownName, "no observer named 'entropie'; did you mean 'entropy'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(small_jobs.stripes_job(), tmp_path / "net.planish", planish.Budget(drop=0.5), **changes)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_knows_its_schemes(tmp_path: Path) -> None:
    out = tmp_path / "net.planish"
    first = run(sentences(), out, planish.Budget(drop=0.2), schemes=("int8-weights",), observer="minmax")
    again = planish.resume(out, sentences(), overwrite=True)
    assert used(again) == used(first) == {"int8-weights"}
    assert again.plan is not None and again.plan.observer == "minmax"


def test_torch_is_left_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = run(small_jobs.stripes_job(), tmp_path / "net.planish", planish.Budget(drop=0.5), target="torch:cpu")
    assert result.plan is None or not result.plan.precisions

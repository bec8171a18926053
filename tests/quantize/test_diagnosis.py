"""The diagnosis of quantization: equal to graphs that `quantize` builds, worst where a fault was planted, and warnings with figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantizing import VNNI, calibration, captured, declares, everything, outputs, quantized
from torch import Tensor, nn

import nets
from planish.data import Split
from planish.graph.graph import Analysis, Graph
from planish.measurement import Diagnosis, Sensitivity
from planish.metrics import get_metric
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.diagnosis import diagnose
from planish.quantize.ranges import calibration_warnings

SAMPLES = 24


class Planted(nn.Module):
    """Three linear maps; the middle one reads a channel that is a thousand times as large as the others, and ignores it."""

    def __init__(self, size: float = 1000.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.first.weight[0] *= size
            self.middle.weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.first(x))))


def diagnosed(graph: Graph, analysis: Analysis, precisions: dict[str, str], **options: Any) -> Diagnosis:
    """A diagnosis on the calibration data of `quantizing`, all of it."""
    split = options.pop("split", None) or calibration(graph, SAMPLES)
    runtime = options.pop("runtime", None) or declares()
    arguments: dict[str, Any] = {"calibrated": SAMPLES, "equalization": "none"} | options
    return diagnose(graph, analysis, precisions, runtime, VNNI, split, **arguments)


def planted(**options: Any) -> tuple[Graph, Analysis, Diagnosis]:
    graph, analysis = captured(Planted(), (torch.randn(2, 8),))
    return graph, analysis, diagnosed(graph, analysis, everything(analysis), observer="minmax", **options)


def row_of(found: Diagnosis, name: str) -> Sensitivity:
    (row,) = [row for row in found.operators if row.name == name]
    return row


def built(graph: Graph, analysis: Analysis, precisions: dict[str, str], observer: str = "mse", runtime: Any = None) -> float:
    """The SQNR of the graph that `quantize` builds of a plan."""
    split = calibration(graph, SAMPLES)
    done = quantized(
        graph,
        analysis,
        runtime,
        precisions=precisions,
        split=split,
        observer=observer,
        samples=SAMPLES,
        bias_correction=False,
        equalization="none",
    )
    return sqnr_db(outputs(graph, split), outputs(done.graph, split))


def test_an_operator_with_a_planted_outlier_is_the_worst_and_is_named() -> None:
    _, _, found = planted()
    assert found.operators[0].name == "middle"
    (said,) = found.findings
    assert said.startswith("middle in int8 loses most of what quantization loses") and "dB" in said
    assert row_of(found, "middle").sqnr_without_db - found.sqnr_db > 6 > row_of(found, "last").sqnr_without_db - found.sqnr_db  # type: ignore[operator]


def test_what_smoothing_cures_is_no_fault() -> None:
    """The outlier is handed to the weights that ignore it."""
    _, _, found = planted(equalization="smooth")
    assert found.sqnr_db > 35 and not found.findings


def test_where_no_operator_is_to_blame_alone_that_is_said() -> None:
    """What `first` issues is rounded for its own sake too, with the outlier in it: leaving `middle` out changes nothing."""
    _, _, found = planted(runtime=declares("linear", "linear gemm"))
    assert found.sqnr_db < 10
    (said,) = found.findings
    assert "no operator is to blame alone" in said
    assert max(row.sqnr_without_db or 0.0 for row in found.operators) < found.sqnr_db + 6


def test_an_operator_that_breaks_and_is_kept_is_named_with_its_place() -> None:
    class Broken(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return self.middle(self.first(x))

    graph, analysis = captured(Broken(), (torch.randn(2, 8),))
    found = diagnosed(graph, analysis, {"first": "int8"}, observer="minmax")
    (said,) = found.findings
    assert said.startswith("middle (the last operator) is kept in fp32: in int8 it would take the outputs from")
    row = row_of(found, "middle")
    assert (row.scheme, row.tried, row.sqnr_without_db) == ("fp32", "int8", found.sqnr_db)
    assert row.sqnr_with_db == pytest.approx(built(graph, analysis, everything(analysis), "minmax"), abs=0.01)


@pytest.mark.parametrize("kinds", ["conv linear", "conv linear add pool"])
def test_all_but_one_equals_the_graph_that_quantize_builds_without_it(kinds: str) -> None:
    graph, analysis = captured(*nets.resnet())
    runtime, plan = declares(kinds), everything(analysis)
    found = diagnosed(graph, analysis, plan, runtime=runtime)
    assert found.sqnr_db == pytest.approx(built(graph, analysis, plan, runtime=runtime), abs=0.01)
    assert {row.name for row in found.operators} == set(plan)
    for row in found.operators[::4]:
        without = {name: scheme for name, scheme in plan.items() if name != row.name}
        assert row.sqnr_without_db == pytest.approx(built(graph, analysis, without, runtime=runtime), abs=0.01)
        assert row.sqnr_with_db == found.sqnr_db


def test_alone_equals_a_graph_with_that_operator_alone_in_each_scheme() -> None:
    graph, analysis, found = planted(schemes=("int8", "int8-dynamic", "int8-weights"))
    # `quantize` also rounds biases to the integers that runtimes make of them
    for name, scheme in [("middle", "int8"), ("middle", "int8-dynamic"), ("last", "int8-weights")]:
        assert row_of(found, name).sqnr_alone_db[scheme] == pytest.approx(built(graph, analysis, {name: scheme}, "minmax"), abs=0.05)
    assert row_of(found, "middle").sqnr_alone_db["int8-weights"] > row_of(found, "middle").sqnr_alone_db["int8"] + 6


def test_a_plan_of_schemes_is_tried_in_its_own_and_in_static_int8() -> None:
    graph, analysis = captured(Planted(), (torch.randn(2, 8),))
    found = diagnosed(graph, analysis, {"first": "int8", "middle": "int8-weights"}, observer="minmax")
    assert set(row_of(found, "middle").sqnr_alone_db) == {"int8", "int8-weights"}
    assert set(row_of(found, "last").sqnr_alone_db) == {"int8"}
    assert (row_of(found, "middle").tried, row_of(found, "last").tried) == ("int8-weights", "int8")
    assert row_of(found, "first").sqnr_without_db == pytest.approx(built(graph, analysis, {"middle": "int8-weights"}, "minmax"), abs=0.01)
    with_last = {"first": "int8", "middle": "int8-weights", "last": "int8"}
    assert row_of(found, "last").sqnr_with_db == pytest.approx(built(graph, analysis, with_last, "minmax"), abs=0.01)


def test_quality_is_the_job_s_metric_with_labels_and_agreement_without() -> None:
    graph, analysis = captured(Planted(), (torch.randn(2, 8),))
    split = calibration(graph, SAMPLES)
    wrong = (outputs(graph, split).argmax(1).numpy() + 1) % 4
    labelled = Split(split.inputs, wrong, split.n)
    found = diagnosed(graph, analysis, everything(analysis), split=split, judged=("validation", labelled), metric=get_metric("accuracy"))
    assert (found.metric, found.quality, found.split, found.samples) == ("accuracy", 0.0, "validation", SAMPLES)
    found = diagnosed(graph, analysis, everything(analysis), judged=("validation", split), metric=get_metric("accuracy"))
    assert (found.metric, found.quality) == ("agreement", 1.0)
    done = quantized(graph, analysis, split=split, samples=SAMPLES, bias_correction=False, equalization="none")
    same = (outputs(graph, split).argmax(1) == outputs(done.graph, split).argmax(1)).double().mean()
    assert found.quality_all == pytest.approx(float(same))


def test_what_lies_outside_the_calibrated_range_counts_as_clipped() -> None:
    graph, analysis = captured(nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),))
    seen = Split([np.linspace(-1, 1, 128, dtype=np.float32).reshape(32, 4)], None, 32)
    wide = np.zeros((25, 4), np.float32)
    wide[:5] = 3.0  # a fifth of the values
    found = diagnosed(graph, analysis, {"0": "int8"}, split=seen, judged=("validation", Split([wide], None, 25)), observer="minmax")
    assert found.operators[0].clipped == pytest.approx(0.2)
    assert any("0 (the first operator): 20 % of its activations on validation are outside the range" in said for said in found.findings)
    inside = diagnosed(graph, analysis, {"0": "int8"}, split=seen, observer="minmax")
    assert inside.operators[0].clipped == 0.0


def test_when_the_time_is_up_the_worst_operators_have_their_figures() -> None:
    calls: list[tuple[int, int]] = []
    graph, analysis = captured(*nets.resnet())
    plan = everything(analysis)
    found = diagnosed(graph, analysis, plan, seconds=1e-6, progress=lambda done, of: calls.append((done, of)))
    assert found.samples == 4
    assert all(row.sqnr_alone_db for row in found.operators) and all(row.sqnr_without_db is None for row in found.operators)
    assert calls == [(i + 1, 2 * len(plan)) for i in range(len(plan))]


def test_nothing_is_changed_and_the_same_is_found_again() -> None:
    graph, analysis, found = planted()
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    assert found == diagnosed(graph, analysis, everything(analysis), observer="minmax")
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


def split_of(*values: Any) -> Split:
    array = np.stack([np.asarray(value, np.float32) for value in values])
    return Split([array], None, len(array))


def test_calibration_data_that_says_little_is_named() -> None:
    assert "one sample only" in calibration_warnings(split_of([1, 2]), {}, ["x"])[0]
    assert "input 'x' has the same value in all 2 samples: 3" in calibration_warnings(split_of([3, 3], [3, 3]), {}, ["x"])[0]
    assert "all 2 samples of input 'x' are the same" in calibration_warnings(split_of([1, 2], [1, 2]), {}, ["x"])[0]
    assert calibration_warnings(split_of([1, 2], [2, 1]), {}, ["x"]) == []


def test_data_out_of_the_calibrated_range_is_named_with_its_share() -> None:
    seen = split_of([0, 1], [1, 0])
    (said,) = calibration_warnings(seen, {"validation": split_of([0.5, 1]), "test": split_of([0.5, 3], [0, -1])}, ["x"])
    assert said.startswith(
        "test: input 'x' goes from -1 to 3, and calibration saw 0 to 1: 50 % of the values are outside, by up to 2 times"
    )


def test_a_value_or_two_beyond_the_range_are_to_be_expected() -> None:
    generator = np.random.default_rng(0)
    seen, other = (Split([generator.normal(size=(64, 64)).astype(np.float32)], None, 64) for _ in range(2))
    other.inputs[0][0, 0] = 1.1 * seen.inputs[0].max()
    assert calibration_warnings(seen, {"test": other}, ["x"]) == []
    tokens = Split([np.arange(8).reshape(4, 2)], None, 4)
    assert calibration_warnings(tokens, {"test": Split([tokens.inputs[0] + 100], None, 4)}, ["ids"]) == []

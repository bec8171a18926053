"""Codebooks: the least error of all that share as many values, the same net from a file of an eighth of the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantizing import VNNI, calibration, captured, declares, outputs, quantized
from torch import nn

import nets
from planish.artifact.deployed import sqnr_db
from planish.graph.fake_quantize import fake_codebook
from planish.quantize.arithmetic import Grid, fake_quantize
from planish.quantize.codebook import fit_codebook
from planish.quantize.observers.mse import MeanSquaredError
from planish.runtimes import to_onnx as export
from planish.runtimes.contract import get_runtime
from planish.target import Target

METHODS = ("kmeans", "mixture")


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_values_are_few_ascending_and_the_nearest_is_taken(method: str) -> None:
    found = fit_codebook(weights(), method, 16)
    assert len(found.values) == 16 and bool((found.values.diff() > 0).all()) and 0.0 in found.values
    rounded = found.rounded(weights())
    distances = (weights()[..., None] - found.values).abs()
    torch.testing.assert_close((rounded - weights()).abs(), distances.min(-1).values)
    assert torch.equal(found.values, fit_codebook(weights(), method, 16).values)


def test_kmeans_errs_less_than_any_even_grid_of_as_many_values() -> None:
    watcher = MeanSquaredError(Grid(0, 15))
    watcher.update(weights())
    even = (fake_quantize(weights(), watcher.quantizer()) - weights()).square().mean()
    shared = (fit_codebook(weights(), "kmeans", 16).rounded(weights()) - weights()).square().mean()
    # for a normal distribution the best 16 values err by 0.0095, the best 16 even steps by 0.0115 (Max, 1960)
    assert float(shared) == pytest.approx(0.0098, rel=0.06) and float(even) > 1.1 * float(shared)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_numbers_give_fewer_values_without_error(method: str) -> None:
    few = torch.tensor([-1.0, 0.0, 0.5]).repeat(40).view(10, 12)
    found = fit_codebook(few, method, 16)
    assert len(found.values) <= 3 and torch.equal(found.rounded(few) == 0, few == 0), "zeros stay zeros"
    torch.testing.assert_close(found.rounded(few), few, atol=1e-3, rtol=0)
    assert len(fit_codebook(torch.full((4, 4), 0.3), method, 16).values) == 2


def test_a_mixture_spends_fewer_values_on_rare_large_numbers() -> None:
    spread = torch.cat([weights().flatten() * 0.1, torch.tensor([5.0, -5.0, 6.0, -6.0])])
    inside = [int((fit_codebook(spread, method, 16).values.abs() < 0.5).sum()) for method in METHODS]
    assert inside[1] >= inside[0] >= 10


def test_the_gradient_passes_straight_through() -> None:
    x = weights().requires_grad_()
    fake_codebook(x, torch.linspace(-2, 2, 16)).sum().backward()
    assert torch.equal(x.grad, torch.ones(64, 64))  # type: ignore[arg-type]


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
@pytest.mark.parametrize("scheme", ["codebook", "codebook-mixture", "w4a8"])
def test_a_file_keeps_half_a_byte_for_each_weight_and_gives_the_same(
    scheme: str, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = get_runtime(runtime, require=False)
    if there.missing():
        pytest.skip(f"{runtime} is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 65))
    graph, analysis = captured(net, (torch.randn(2, 3, 8, 8),))
    done = quantized(graph, analysis, there, VNNI, precisions=dict.fromkeys(analysis.operators, scheme))
    assert len(done.operators) == 3
    split = calibration(graph, samples=3, seed=9)
    sizes, results, kernels = [], [], []
    for name in ("packed", "plain"):
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr(export, "pack_codebooks", lambda model: None)
            (tmp_path / name).mkdir()
            path = there.export(done.graph, tmp_path / name)
        session = there.open(path, graph.signature, Target(runtime))
        results.append(session.run(list(split.inputs))[0])
        sizes.append(path.stat().st_size)
        kernels.append(session.proof().kernels)
    np.testing.assert_array_equal(*results)
    assert kernels[0] == kernels[1], "the weights are restored while the file is loaded"
    count = sum(p.numel() for p in net.parameters() if p.dim() > 1 and p.numel() > 4096)
    assert sizes[1] - sizes[0] == pytest.approx(count * ((1 if scheme == "w4a8" else 4) - 0.5), rel=0.06)
    if scheme != "w4a8":
        assert sqnr_db(outputs(done.graph, split).numpy(), results[0]) > 100.0


def test_options_of_codebooks_are_offered_for_convolutions_too() -> None:
    from planish.quantize.options import precision_options

    graph, analysis = captured(*nets.resnet())
    options = precision_options(graph, analysis, declares(), VNNI, calibration(graph), ("codebook",))
    assert {option.subject for option in options} == {n for n, o in analysis.operators.items() if o.kind in ("conv", "linear")}
    assert sum(option.loss for option in options) > 0

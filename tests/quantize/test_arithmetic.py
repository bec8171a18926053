"""Grids and fake quantization against closed forms and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.graph.fake_quantize import fake_quantize_per_tensor_affine
from planish.quantize.arithmetic import UINT8, Grid, fake_quantize, int8_weights, quantizer_from_range, sqnr_db

GRIDS = [UINT8, Grid(-63, 63, symmetric=True), Grid(-127, 127, symmetric=True)]
bounds = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(0.0, 255.0, 1.0, 0), (-1.0, 1.55, 0.01, 100), (-2.55, 0.0, 0.01, 255), (1.0, 2.55, 0.01, 0), (-2.55, -1.0, 0.01, 255)],
)
def test_affine_grid_covers_the_range_and_zero(low: float, high: float, scale: float, zero_point: int) -> None:
    quantizer = quantizer_from_range(torch.tensor(low), torch.tensor(high), UINT8)
    assert float(quantizer.scale) == pytest.approx(scale, rel=1e-6)
    assert int(quantizer.zero_point) == zero_point
    half = scale / 2
    assert float(quantizer.low) <= min(low, 0.0) + half * 1.001 and float(quantizer.high) >= max(high, 0.0) - half * 1.001


@pytest.mark.parametrize("largest", [63, 127])
def test_symmetric_grid_reaches_the_larger_side_of_each_channel(largest: int) -> None:
    low, high = torch.tensor([-1.0, -0.5, 0.0]), torch.tensor([0.25, 2.0, 0.0])
    quantizer = quantizer_from_range(low, high, int8_weights(largest))
    torch.testing.assert_close(quantizer.scale, torch.tensor([1.0 / largest, 2.0 / largest, 1.0]))
    assert quantizer.zero_point.tolist() == [0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(a=bounds, b=bounds, grid=st.sampled_from(GRIDS), seed=st.integers(0, 1000))
def test_fake_quantization_is_idempotent_and_keeps_zero(a: float, b: float, grid: Grid, seed: int) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    quantizer = quantizer_from_range(low, high, grid)
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * max(abs(a), abs(b), 1e-3)
    values[0] = 0.0
    once = fake_quantize(values, quantizer)
    assert torch.equal(fake_quantize(once, quantizer), once)
    assert float(once[0]) == 0.0
    assert len(once.unique()) <= grid.high - grid.low + 1
    inside = (values >= quantizer.low) & (values <= quantizer.high)
    # round to nearest is off by half a step; float32 adds a few ulp of the largest value
    bound = quantizer.scale * 0.5 + 4 * torch.finfo(torch.float32).eps * values.abs().max()
    assert bool(((once - values).abs()[inside] <= bound).all())


@pytest.mark.parametrize("span", [0.0, 1e-30, 1e-21])
def test_no_range_gives_a_finite_scale_and_zeros(span: float) -> None:
    for grid in GRIDS:
        quantizer = quantizer_from_range(torch.tensor(-span), torch.tensor(span), grid)
        assert float(quantizer.scale) == 1.0
        assert float(fake_quantize(torch.tensor([span]), quantizer)) == 0.0


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    values = torch.tensor([-1.0, 0.3, 2.0, 9.0], requires_grad=True)
    fake_quantize(values, quantizer_from_range(torch.tensor(0.0), torch.tensor(2.55), UINT8)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_channels_of_the_second_dimension_have_their_own_scales() -> None:
    values = torch.tensor([[1.0, 100.0], [-0.5, 30.0]])
    quantizer = quantizer_from_range(torch.tensor([-0.5, 0.0]), torch.tensor([1.0, 100.0]), int8_weights(127, axis=1))
    rounded = fake_quantize(values, quantizer)
    assert float((rounded[:, 0] - values[:, 0]).abs().max()) <= 0.5 / 127
    assert float((rounded[:, 1] - values[:, 1]).abs().max()) <= 50.0 / 127


def test_sqnr_of_a_known_error() -> None:
    assert sqnr_db(torch.ones(4), torch.ones(4) * 1.1) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(torch.ones(4), torch.ones(4)) == float("inf")


@pytest.mark.parametrize(
    ("scale", "zero_point", "low", "high"), [(0.03, 7, 0, 255), (0.004, 0, 0, 255), (0.1, 20, -63, 63), (1.7e-3, 128, 10, 200)]
)
def test_rounding_and_its_gradient_are_torchs_own(scale: float, zero_point: int, low: int, high: int) -> None:
    values = torch.randn(4, 16, 9, 7, generator=torch.Generator().manual_seed(3)).contiguous(memory_format=torch.channels_last)
    values[0, 0, 0, :3] = torch.tensor([0.0, 1e6, -1e6])
    weights, results = torch.randn(values.shape, generator=torch.Generator().manual_seed(4)), []
    for rounding in (fake_quantize_per_tensor_affine, torch.fake_quantize_per_tensor_affine):
        x = values.clone().requires_grad_()
        out = rounding(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), low, high)
        (out * weights).sum().backward()
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_a_number_stays_none() -> None:
    rounded = fake_quantize_per_tensor_affine(torch.tensor([math.nan, 1.0]), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 255)
    assert math.isnan(rounded[0]) and float(rounded[1]) == pytest.approx(1.0)

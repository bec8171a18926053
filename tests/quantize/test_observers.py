"""Observers: the contract, closed forms, and torch's own observers as an independent oracle."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from planish import registry
from planish.quantize.arithmetic import UINT8, Grid, fake_quantize, int8_weights
from planish.quantize.observers.histogram import BINS
from planish.quantize.observers.minmax import MinMax
from planish.quantize.observers.mse import CLOSE, MeanSquaredError
from planish.testing.observers import check_observer


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", registry.names("observer"))
def test_keeps_the_contract(name: str) -> None:
    check_observer(registry.get("observer", name))


def test_minmax_of_several_batches_equals_torch() -> None:
    theirs, ours = MinMaxObserver(dtype=torch.quint8, eps=1e-30), MinMax(UINT8)
    for seed in range(3):
        values = normal(7, 5, seed=seed) + 0.3
        theirs(values)
        ours.update(values)
    scale, zero_point = theirs.calculate_qparams()
    assert float(ours.quantizer().scale) == pytest.approx(float(scale), rel=1e-6)
    assert int(ours.quantizer().zero_point) == int(zero_point)


@pytest.mark.parametrize("axis", [0, 1])
def test_minmax_per_channel_equals_torch(axis: int) -> None:
    values = normal(6, 4, 3, 3) * torch.arange(1, 7).view(6, 1, 1, 1)
    theirs = PerChannelMinMaxObserver(
        ch_axis=axis, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127, eps=1e-30
    )
    theirs(values)
    ours = MinMax(int8_weights(127, axis))
    ours.update(values)
    # torch divides the whole width, 2 max, by the 254 steps of the grid: the same number
    torch.testing.assert_close(ours.quantizer().scale, theirs.calculate_qparams()[0], rtol=1e-6, atol=0)


def test_uniform_values_are_not_clipped() -> None:
    """Clipping a share c of uniform values costs c^3 / 3 of the squared range and saves 2 c / 12 / 255^2 of it: no c worth trying."""
    values = torch.linspace(-1.0, 2.0, 30001)
    observer = MeanSquaredError(UINT8)
    observer.update(values)
    assert float(observer.quantizer().scale) == pytest.approx(3.0 / 255, rel=1e-4)


def test_a_single_outlier_is_clipped_from_a_tensor_and_from_its_channel() -> None:
    """One value of 40 among 2^17 normal ones: clipped to 20 it costs 400 / 2^17 = 3.1e-3; the whole range costs (40 / 255)^2 / 12 = 2.1e-3
    everywhere for a rectified tensor, so it stays; on a grid of 63 steps it costs 3.4e-2, so it goes."""
    values = normal(1 << 17).abs()
    values[5] = 40.0
    wide = MeanSquaredError(UINT8)
    wide.update(values)
    assert float(wide.quantizer().high) > 25
    rows = torch.stack([values, normal(1 << 17, seed=1)])
    narrow = MeanSquaredError(int8_weights(63))
    narrow.update(rows)
    scale = narrow.quantizer().scale * 63
    assert float(scale[0]) < 25
    assert float(scale[1]) > 3.0


@pytest.mark.parametrize(
    "make_values", [lambda: normal(4000), lambda: normal(4000).relu(), lambda: normal(4000).exp(), lambda: -normal(4000).abs()]
)
def test_mse_is_close_to_the_least_error_of_an_exhaustive_search(make_values) -> None:  # type: ignore[no-untyped-def]
    values = make_values()
    observer, whole = MeanSquaredError(UINT8), MinMax(UINT8)
    observer.update(values)
    whole.update(values)

    def error(quantizer) -> float:  # type: ignore[no-untyped-def]
        return float((fake_quantize(values, quantizer) - values).double().square().mean())

    least = min(
        error(narrow.quantizer())
        for low in torch.linspace(0.2, 1.0, 33)
        for high in torch.linspace(0.2, 1.0, 33)
        if (narrow := MinMax(UINT8)).update(torch.stack([low * values.min(), high * values.max()])) is None
    )
    assert error(observer.quantizer()) <= error(whole.quantizer()) * 1.001
    # each of two coordinate searches may accept CLOSE; the bins are 1/8 of a step, which is good for about 1 %
    assert error(observer.quantizer()) <= CLOSE**2 * 1.02 * least


def test_histogram_of_many_batches_equals_that_of_one() -> None:
    values = torch.cat([normal(3000) * scale for scale in (0.01, 1.0, 0.1, 7.0, 30.0)])
    at_once, in_turn = MeanSquaredError(UINT8), MeanSquaredError(UINT8)
    at_once.update(values)
    for batch in values.split(3000):
        in_turn.update(batch)
    # the bins of the second were doubled several times: they are at most twice as wide
    assert float(in_turn.quantizer().scale) == pytest.approx(float(at_once.quantizer().scale), rel=0.05)
    means, count = in_turn._histogram.points()
    assert float(count.sum()) == len(values)
    assert float((means.double() * count).sum()) == pytest.approx(float(values.double().sum()), rel=1e-5)


def test_memory_does_not_grow_with_the_batches() -> None:
    observer = MeanSquaredError(UINT8)
    for seed in range(50):
        observer.update(normal(1000, seed=seed) * (seed + 1))
    assert len(observer._histogram.points()[0]) <= 2 * BINS and not observer._channels


def test_zeros_before_values_are_kept_at_zero() -> None:
    observer = MeanSquaredError(UINT8)
    observer.update(torch.zeros(100))
    observer.update(torch.full((100,), 5.0))
    assert float(observer.quantizer().high) == pytest.approx(5.0, rel=1e-6)


def test_a_thinned_out_tensor_gives_nearly_the_same_range() -> None:
    values = normal(1 << 20).view(16, 64, 32, 32)
    observer = MeanSquaredError(UINT8)
    observer.update(values)
    few = MeanSquaredError(UINT8)
    few.update(values.flatten()[: 1 << 18])
    assert float(observer.quantizer().scale) == pytest.approx(float(few.quantizer().scale), rel=0.15)


@pytest.mark.parametrize(("name", "kept"), [("percentile", 20.0), ("entropy", 20.0), ("moving-average", 20.0)])
def test_one_rare_value_does_not_take_the_range(name: str, kept: float) -> None:
    """Of 100,000 rectified normal values one is 40 times as large as the rest: these clip it, and none clips the rest."""
    observer, widest = registry.get("observer", name)(Grid(0, 63)), MinMax(Grid(0, 63))
    for seed in range(40):
        values = normal(2500, seed=seed).abs()
        if seed == 7:
            values[0] = 160.0
        for one in (observer, widest):
            one.update(values)
    assert float(widest.quantizer().high) == pytest.approx(160.0, rel=1e-3)
    assert 2.0 < float(observer.quantizer().high) < kept


def test_the_percentile_is_of_the_values() -> None:
    """Of 0 to 9,999 one in ten thousand lies at either end: the first and the last."""
    observer = registry.get("observer", "percentile")(UINT8)
    observer.update(torch.arange(-5000.0, 5000.0))
    found = observer.quantizer()
    assert float(found.high) == pytest.approx(4999.0, rel=0.01) and float(found.low) == pytest.approx(-5000.0, rel=0.01)


def test_the_average_moves_like_torchs_own_once_it_has_settled() -> None:
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver

    theirs = MovingAverageMinMaxObserver(averaging_constant=0.1, dtype=torch.quint8, eps=1e-30)
    ours = registry.get("observer", "moving-average")(UINT8)
    for seed in range(200):
        values = normal(50, seed=seed)
        theirs(values)
        ours.update(values)
    scale, _ = theirs.calculate_qparams()
    assert float(ours.quantizer().scale) == pytest.approx(float(scale), rel=1e-4)


def test_entropy_keeps_uniform_values_whole() -> None:
    observer = registry.get("observer", "entropy")(UINT8)
    observer.update(torch.linspace(0.0, 3.0, 100_000))
    assert float(observer.quantizer().high) == pytest.approx(3.0, rel=0.02)

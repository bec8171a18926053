"""The contract that every observer keeps; authors of plug-ins run it too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from planish.quantize.arithmetic import UINT8, Grid, Quantizer, fake_quantize, int8_weights
from planish.quantize.contract import Observer


def check_observer(make: Callable[[Grid], Observer], seed: int = 0) -> None:
    """Asserts what `Observer` promises, on activations and on weights of both ranges.

    Args:
        make: gives a fresh observer for a grid.
        seed: of the values.
    """
    for grid in (UINT8, int8_weights(63), int8_weights(127), int8_weights(127, axis=1)):
        shape = (16, 8, 3, 3)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        _check_values(make, grid, values)
        _check_values(make, grid, values.abs())
        _check_values(make, grid, values * 1e-12)
        _check_values(make, grid, values * 1e12)
        _check_zeros(make, grid, torch.zeros(shape))
        try:
            make(grid).quantizer()
        except ValueError:
            continue
        raise AssertionError("a quantizer was given although nothing was watched")


def _check_values(make: Callable[[Grid], Observer], grid: Grid, values: Tensor) -> None:
    kept, random_state = values.clone(), torch.random.get_rng_state()
    quantizer = _watched(make, grid, values)
    assert torch.equal(values, kept), "the values were changed"
    assert torch.equal(torch.random.get_rng_state(), random_state), "random numbers were drawn"
    again = _watched(make, grid, values)
    assert torch.equal(quantizer.scale, again.scale) and torch.equal(quantizer.zero_point, again.zero_point), "not repeatable"
    _check_form(quantizer, grid, values)
    rounded = fake_quantize(values, quantizer)
    assert torch.isfinite(rounded).all()
    assert (rounded - values).square().mean() < 0.01 * values.square().mean(), "the grid misses the values"


def _check_zeros(make: Callable[[Grid], Observer], grid: Grid, zeros: Tensor) -> None:
    quantizer = _watched(make, grid, zeros)
    _check_form(quantizer, grid, zeros)
    assert torch.equal(fake_quantize(zeros, quantizer), zeros)


def _watched(make: Callable[[Grid], Observer], grid: Grid, values: Tensor) -> Quantizer:
    observer = make(grid)
    if grid.axis is None:
        for batch in torch.split(values, 5):
            observer.update(batch)
    else:
        observer.update(values)
    return observer.quantizer()


def _check_form(quantizer: Quantizer, grid: Grid, values: Tensor) -> None:
    shape = () if grid.axis is None else (values.shape[grid.axis],)
    assert quantizer.grid == grid
    assert quantizer.scale.shape == shape and quantizer.scale.dtype == torch.float32
    assert quantizer.zero_point.shape == shape and quantizer.zero_point.dtype == torch.int32
    assert torch.isfinite(quantizer.scale).all() and (quantizer.scale > 0).all()
    assert ((quantizer.zero_point >= grid.low) & (quantizer.zero_point <= grid.high)).all()
    if grid.symmetric:
        assert (quantizer.zero_point == 0).all()

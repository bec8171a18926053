"""The contract that every rounding keeps; authors of plug-ins run it too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from planish.quantize.arithmetic import Grid
from planish.quantize.contract import Layer, Rounded, Rounding
from planish.quantize.local import group_quantizer
from planish.quantize.observers.minmax import MinMax
from planish.testing.masking import correlated

_ROWS, _COLUMNS, _GROUP = 6, 48, 16
_SYMMETRIC, _AFFINE = Grid(-7, 7, symmetric=True), Grid(0, 15)


def layer(seed: int = 0, group: int = _COLUMNS, grid: Grid = _SYMMETRIC, is_fixed: bool = True, gram: Tensor | None = None) -> Layer:
    """A layer of correlated inputs at four bits.

    Args:
        group: columns that share a scale.
        grid: the integers.
        is_fixed: whether the scales must stay as they are.
        gram: of the inputs, in place of the correlated ones', [48, 48].
    """
    weight, found = correlated(seed, _ROWS, _COLUMNS)
    weight = weight.float()
    quantizer = group_quantizer(weight, grid, group, MinMax)
    regrid = None if is_fixed else functools.partial(group_quantizer, grid=grid, group=group, make=MinMax)
    return Layer(weight, quantizer, (found if gram is None else gram)[None], regrid)


def check_rounding(make: Callable[[], Rounding]) -> None:
    """Asserts what `Rounding` promises of layers that come alone: weights on their grids, the same again, nothing changed, any inputs.

    Args:
        make: gives a fresh method.
    """
    needs = make().needs
    assert needs <= {"moments", "blocks"} and ("moments" in needs or not needs), needs
    for given in (layer(), layer(group=_GROUP, grid=_AFFINE), layer(group=_GROUP, grid=_AFFINE, is_fixed=False)):
        found = _checked(make, given)
        if needs:
            nearest = given.quantizer.rounded(given.weight)
            assert float(given.errors(found.weight).sum()) < 0.9 * float(given.errors(nearest).sum()), "no better than nearest"
    _, gram = correlated(0, _ROWS, _COLUMNS)
    dead = gram.clone()
    dead[5], dead[:, 5] = 0.0, 0.0
    one = torch.linspace(-1.0, 1.0, _COLUMNS, dtype=torch.float64)
    for strange in (dead, torch.outer(one, one), torch.zeros_like(gram), gram * 1e-18, gram * 1e12):
        _checked(make, layer(gram=strange))
    systems = layer()
    assert systems.gram is not None
    _checked(make, Layer(systems.weight, systems.quantizer, torch.cat([systems.gram, 2 * systems.gram])))


def _checked(make: Callable[[], Rounding], given: Layer) -> Rounded:
    weight, gram, state = given.weight.clone(), given.gram, torch.random.get_rng_state()
    kept = gram.clone() if gram is not None else None
    with torch.no_grad():
        (found,), (again,) = (_once(make, given) for _ in range(2))
    assert torch.equal(given.weight, weight), "the weight was changed"
    assert gram is None or kept is None or torch.equal(gram, kept), "the moments were changed"
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers came from elsewhere than the generator"
    assert found.weight.shape == weight.shape and found.weight.dtype == weight.dtype and bool(torch.isfinite(found.weight).all())
    assert not found.weight.requires_grad
    assert torch.equal(found.quantizer.rounded(found.weight), found.weight), "a weight is not on its grid"
    assert found.quantizer.scale.shape == given.quantizer.scale.shape and found.quantizer.grid == given.quantizer.grid
    assert given.regrid is not None or torch.equal(found.quantizer.scale, given.quantizer.scale), "a scale that must stay was changed"
    assert torch.equal(found.weight, again.weight), "another time it gave something else"
    return found


def _once(make: Callable[[], Rounding], given: Layer) -> Sequence[Rounded]:
    return make().rounded([given], None, torch.Generator().manual_seed(0))

"""The contract that every method for masks keeps; authors of plug-ins run it too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from planish.prune.masks.contract import Masking
from planish.prune.masks.pattern import parse_pattern

_ROWS, _COLUMNS = 24, 192


def correlated(seed: int = 0, rows: int = _ROWS, columns: int = _COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and E[x x^T] of inputs that vary together and unequally, [columns, columns]; float64."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(4096, columns // 4, generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    x = mixed + torch.randn(4096, columns, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.2, 2.0, columns, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def layer_error(weight: Tensor, masked: Tensor, gram: Tensor) -> float:
    """E|(W - W') x|^2, summed over rows."""
    gone = weight - masked
    return float(((gone @ gram) * gone).sum())


def check_masking(make: Callable[[], Masking], is_informed: bool = True) -> None:
    """Asserts what `Masking` promises: as many zeros as the pattern asks for and where, the same again, nothing changed, numbers kept apart.

    Args:
        make: gives a fresh method.
        is_informed: whether it looks at the inputs: magnitude cannot know which of them is always zero.
    """
    weight, gram = correlated()
    needed = "data" in make().needs
    for text in ("50%", "75%", "90%", "33.3%", "2:4", "4:8", "1:3"):
        pattern, given, moments = parse_pattern(text), weight.clone(), gram.clone()
        found = make().masked(given, moments if needed else None, pattern)
        assert torch.equal(given, weight) and torch.equal(moments, gram), f"{text}: what was given was changed"
        assert found.shape == weight.shape and found.dtype == weight.dtype and bool(torch.isfinite(found).all()), text
        assert int((found == 0).sum()) == _ROWS * pattern.gone(_COLUMNS), f"{text}: {int((found == 0).sum())} zeros"
        if pattern.of:
            full = (found.reshape(-1, pattern.of) != 0).sum(1)
            assert bool((full == pattern.kept).all()), f"{text}: a group keeps {int(full.max())} weights"
        assert torch.equal(found, make().masked(weight, moments if needed else None, pattern)), (
            f"{text}: another time it gave something else"
        )
        assert layer_error(weight, found, gram) < layer_error(weight, torch.zeros_like(weight), gram), text

    dead = gram.clone()
    dead[5], dead[:, 5] = 0.0, 0.0
    strange = weight.clone()
    strange[3, 7] = torch.nan
    for text in ("50%", "2:4"):
        found = make().masked(weight, dead if needed else None, parse_pattern(text))
        if is_informed:
            assert not bool(found[:, 5].any()), f"{text}: an input that is always zero must go first"
        found = make().masked(strange, gram if needed else None, parse_pattern(text))
        assert bool(found[3, 7].isnan()) and int(found.isnan().sum()) == 1, f"{text}: a weight that is no number must stay, alone"

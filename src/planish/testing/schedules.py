"""The contract that every schedule keeps; authors of plug-ins run it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from planish.graph.graph import Graph
from planish.prune.shaping import Schedule, Shaped, Shaping


def check_schedule(make: Callable[[], Schedule], shaping: Shaping) -> Shaped:
    """Asserts what `Schedule` promises: as narrow as asked for or as cheap, a sound smaller net, what it kept, nothing else changed.

    Args:
        make: gives a fresh schedule.
        shaping: with a `fit` that trains a few steps.
    """
    before = {name: value.clone() for name, value in shaping.graph.module.state_dict().items()}
    widths = {name: group.units for name, group in shaping.analysis.groups.items()}
    shaped = make().shape(shaping)
    for name, width in shaped.widths.items():
        group = shaping.analysis.groups[name]
        for key in (key for key in group.unit_of if key in shaped.kept):
            units = group.unit_of[key][shaped.kept[key]]
            assert len(np.unique(units[units >= 0])) == width, f"{name}: {key} does not hold the {width} units that are said to stay"
        assert width == group.units or any(key in shaped.kept for key in group.unit_of), f"{name} is as it was, {width} are said to stay"
        must_stay = np.flatnonzero(np.isnan(shaping.orders[name].scores))
        for key in (key for key in group.unit_of if key in shaped.kept):
            assert np.isin(must_stay, group.unit_of[key][shaped.kept[key]]).all(), f"{name}: a unit that must stay is gone"
    spent, allowed = (_price(shaping, {**widths, **chosen}) for chosen in (shaped.widths, shaping.widths))
    assert spent <= allowed * (1 + 1e-9), f"what stays costs {spent}, {allowed} were allowed"

    now = shaped.graph.module.state_dict()
    for (name, dim), indices in shaped.kept.items():
        assert now[name].shape[dim] == len(indices) < before[name].shape[dim], name
    shrunk = {name for name, _ in shaped.kept}
    assert all(value.shape == before[name].shape for name, value in now.items() if name not in shrunk and name in before)
    with torch.no_grad():
        outputs = shaped.graph.module(*shaping.graph.example)
    assert all(bool(torch.isfinite(value).all()) for value in outputs if value.is_floating_point())
    for name, value in shaping.graph.module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the given graph was changed"
    return shaped


def _price(shaping: Shaping, widths: Mapping[str, int]) -> float:
    return shaping.price({name: torch.tensor(float(width)) for name, width in widths.items()}).item()


def trainer(graph: Graph, inputs: list[Tensor], steps: int, rate: float = 0.02) -> Callable[..., None]:
    """A `Fit` towards the present outputs of `graph`: some steps of gradient descent with momentum on all inputs."""
    with torch.no_grad():
        wanted = [value.clone() for value in graph.module(*inputs)]

    def fit(
        trained: Graph,
        share: float,
        name: str,
        penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[float, float], None] | None = None,
    ) -> None:
        parameters = [p.requires_grad_() for p in trained.module.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            outputs = trained.module(*inputs)
            loss = sum(((a - b) ** 2).mean() for a, b in zip(outputs, wanted, strict=True))
            loss = loss if penalty is None else loss + penalty()
            loss.backward()
            optimizer.step()
            if after_step is not None:
                after_step(rate, (step + 1) / steps)

    return fit

"""Each family of nets through the whole flow with real clocks: what comes out loads, computes what its module computes, and verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nets
import planish

WIDE = {
    "resnet_b": lambda: nets.resnet(2, "B", 16, 32),
    "mobilenet": lambda: nets.mobilenet(32),
    "densenet": lambda: nets.densenet(6),
    "bert": lambda: nets.bert(2, hidden_size=64, intermediate_size=256),
    "lstm": lambda: nets.lstm(2, hidden=96),
}


class Rows(torch.utils.data.Dataset[Any]):
    """Samples of a net's inputs, without labels."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        first = next(iter(self.inputs.values())) if isinstance(self.inputs, dict) else self.inputs[0]
        return len(first)

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.inputs, dict):
            return {name: value[i] for name, value in self.inputs.items()}
        return self.inputs[0][i] if len(self.inputs) == 1 else tuple(value[i] for value in self.inputs)


def job_of(model: nn.Module, example: Any, name: str) -> planish.Workload:
    """Label-free: agreement with the original's own answers, on random inputs."""
    splits = {part: Rows(nets.resized(example, n, seed=seed)) for seed, (part, n) in enumerate((("train", 256), ("validation", 200)))}
    return planish.Workload(model=model, example_inputs=nets.resized(example, 1), metric="agreement", name=name, **splits)


@pytest.mark.slow
@pytest.mark.parametrize("net", list(WIDE))
@pytest.mark.parametrize("target", ["cpu", "onnxruntime:cpu", "torch:cpu"])
def test_a_family_comes_out_whole(tmp_path: Path, net: str, target: str) -> None:
    model, example = WIDE[net]()
    budget = planish.Budget(latency="0.8x", drop="60pt")
    result = planish.optimize(
        job_of(model, example, net), target, budget, tmp_path / "net.planish", time_limit=60, accept_nearest=True, threads=2
    )
    assert result.verdict in ("met", "infeasible", "undecided")
    assert result.plan is not None and not result.plan.is_identity, result.reason
    loaded = planish.load(tmp_path / "net.planish", threads=2)
    for batch in (1, 3):
        inputs = nets.resized(example, batch, seed=9)
        with torch.no_grad():
            wanted = result.module(**inputs) if isinstance(inputs, dict) else result.module(*inputs)
        got = loaded(inputs) if isinstance(inputs, dict) else loaded(*inputs)
        for one, other in zip(_flat(wanted), _flat(got), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, atol=0.05 * np.abs(one).max())
    assert planish.verify(tmp_path / "net.planish").holds


def _flat(outputs: Any) -> list[Any]:
    values = [outputs] if isinstance(outputs, torch.Tensor) else outputs if isinstance(outputs, tuple) else outputs.values()
    return [value.detach().numpy() for value in values]

"""The flow on a net of attention: heads and the places in them are both decided, removed, refitted, exported and verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planish
import replaying

HEADS, SIZE = 8, 16


class Attending(nn.Module):
    """Which of four tokens is there, by attention alone: no branch beside it that could stay in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(6, 16), nn.Linear(16, 3 * HEADS * SIZE)
        self.out, self.head = nn.Linear(HEADS * SIZE, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, shape (n, 4)."""
        q, k, v = (part.unflatten(2, (HEADS, SIZE)).transpose(1, 2) for part in self.qkv(self.embed(x)).chunk(3, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(torch.relu(self.out(y)).mean(1))


def sequences(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a mark in one of the first four features of one of five positions."""
    generator = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.randn(n, 5, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)
    x[torch.arange(n), torch.randint(0, 5, (n,), generator=generator), y] += 2
    return x, y


def test_a_plan_narrows_heads_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Attending()
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), lr=3e-3), sequences(256, 1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    x, y = sequences(320, 2)
    splits = {
        name: [(x[rows], y[rows])]
        for name, rows in zip(("train", "validation", "test"), map(slice, (0, 160, 240), (160, 240, 320)), strict=True)
    }
    job = planish.Workload(model=net.eval(), example_inputs=(x[:1],), name="attending", **splits)
    out = tmp_path / "net.planish"
    budget = planish.Budget(macs="0.3x", drop=0.3)
    result = planish.optimize(job, "onnxruntime:cpu", budget, out, techniques=("prune",), trials=2, threads=1, time_limit=60)
    assert result.verdict == "met", result.summary.reason
    assert result.plan is not None
    heads, *places = (result.plan.widths.get(name) for name in ("qkv", "qkv.size", "qkv.size#2"))
    assert heads is not None and heads < HEADS and min(width or SIZE for width in places) < SIZE
    assert result.ratios["macs"].median <= 0.3
    with torch.no_grad():
        np.testing.assert_allclose(planish.load(out)(x[:5].numpy()), result.module(x[:5]).numpy(), atol=1e-4)
    assert planish.verify(out).holds

"""Small jobs for the tests of the flow: nets of a few layers, data made from a seed, seconds from start to end."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

import planish

CLASSES = 4


class Net(nn.Module):
    """Two convolutions, one of them with batch norm, wide enough that a processor has something to save."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the classes, shape (n, 4)."""
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes in four directions, shape (n, 1, 12, 12), and their classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    stripes = torch.stack([torch.sin(1.5 * direction) for direction in (rows, columns, rows + columns, rows - columns)])
    x = stripes[y] + 0.4 * torch.randn(n, 12, 12, generator=generator)
    return x[:, None], y


def trained(steps: int = 20) -> nn.Module:
    """A net of its own that tells the stripes apart; the random state of the caller is left alone."""
    return copy.deepcopy(_trained(steps))


@functools.cache
def _trained(steps: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    x, y = images(64 * steps, seed=1)
    for i in range(steps):
        rows = slice(64 * i, 64 * i + 64)
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def stripes_job(net: nn.Module | None = None, **changes: Any) -> planish.Workload:
    """The job of the stripes; `changes` are arguments of `Workload`."""
    x, y = images(320, seed=2)
    arguments: dict[str, Any] = {
        "model": net or trained(),
        "example_inputs": (x[:1],),
        "train": [(x[:192], y[:192])],
        "validation": [(x[192:256], y[192:256])],
        "test": [(x[256:], y[256:])],
        "name": "stripes",
    }
    return planish.Workload(**arguments | changes)

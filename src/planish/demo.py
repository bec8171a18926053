"""The main job on data that a dependency ships: a residual CNN on scikit-learn's handwritten digits, trained here, then optimized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from planish.budget import Budget
from planish.events import Events, Silent
from planish.flow import optimize
from planish.workload import Workload

if TYPE_CHECKING:
    import torch

    from planish.result import Result

LATENCY, DROP = "0.5x", "1pt"
_EPOCHS = 6


def build(width: int = 160) -> torch.nn.Module:
    """A residual CNN for 8 x 8 grey images in ten classes, about 141 million MACs: bound by arithmetic, not by dispatch."""
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.shortcut: nn.Module = nn.Identity()
            if stride != 1 or inputs != outputs:
                self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, width, 1),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 2 * width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def digits(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Images `[n, 1, 8, 8]` in [0, 1] and labels `[n]` of the three splits: train (1,100), validation (250), test (447)."""
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    bounds = (order[:1100], order[1100:1350], order[1350:])
    return [images[i] for i in bounds], [labels[i] for i in bounds]


def train(seed: int, events: Events) -> Workload:
    """The demo's job: the trained net with its splits."""
    import torch
    from torch.nn import functional as F

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
        images, labels = digits(seed)
        steps = _EPOCHS * (len(images[0]) // 50)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.train()
        done = 0
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(images[0])).split(50):  # type: ignore[no-untyped-call]
                if len(batch) < 50:
                    continue
                optimizer.zero_grad()
                F.cross_entropy(net(images[0][batch]), labels[0][batch], label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                done += 1
                events.progress(done, steps)
        net.eval()
    splits = [torch.utils.data.TensorDataset(x, y) for x, y in zip(images, labels, strict=True)]
    return Workload(
        model=net,
        example_inputs=(images[1][:1],),
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        metric="accuracy",
        name="digits",
    )


def run(out: Path, *, events: Events | None = None, seed: int = 0, threads: int | None = None, overwrite: bool = False) -> Result:
    """Train the demo's net in under a minute, then optimize it to half its latency at no more than one point of accuracy."""
    events = events or Silent()
    events.stage("training a CNN on handwritten digits")
    job = train(seed, events)
    return optimize(
        job,
        budget=Budget(latency=LATENCY, drop=DROP),
        out=out,
        seed=seed,
        threads=threads,
        events=events,
        overwrite=overwrite,
        time_limit=135,
    )

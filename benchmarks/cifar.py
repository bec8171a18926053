"""CIFAR-10 and its ResNets for the benchmarks: read from `--data DIR` (or PLANISH_DATA), never shipped with the project."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import planish

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class Block(nn.Module):
    """He et al. 2016, section 4.2: two 3x3 convolutions and a shortcut: stride-2 subsampling with zero-padded channels (option A), or a 1x1
    convolution (option B) that begins as the same map."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2 if stride != 1 or inputs != outputs else None
        self.shortcut = None
        if option == "B" and self.pad is not None:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            nn.init.zeros_(self.shortcut.weight)
            with torch.no_grad():
                self.shortcut.weight[self.pad : self.pad + inputs, :, 0, 0] = torch.eye(inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.pad is not None:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of `6 n + 2` layers, with the parameter names of the checkpoints."""

    def __init__(self, n: int, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, (outputs, stride) in enumerate([(16, 1), (32, 2), (64, 2)], 1):
            blocks = []
            for i in range(n):
                blocks.append(Block(width, outputs, stride if i == 0 else 1, option))
                width = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def data_folder(given: str | None) -> Path:
    """The folder with the data, from `--data` or PLANISH_DATA."""
    folder = given or os.environ.get("PLANISH_DATA")
    if not folder:
        raise SystemExit("give the folder with the data: --data DIR, or PLANISH_DATA")
    return Path(folder)


def images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images `[n, 3, 32, 32]` and labels `[n]`."""
    pixels, labels = [], []
    from PIL import Image

    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".jpg"):
                file = archive.extractfile(member)
                assert file is not None
                pixels.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                labels.append(CLASSES.index(member.name.split("/")[-2]))
    x = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()).float() / 255
    return (x - MEAN) / STD, torch.tensor(labels)


def resnet(depth: int, folder: Path, option: str = "A") -> ResNet:
    """The adapted checkpoint of that depth; with shortcuts of option B it computes the same."""
    net = ResNet((depth - 2) // 6, option)
    missing, unexpected = net.load_state_dict(load_file(folder / f"cifar10_resnet{depth}.safetensors"), strict=False)
    assert not unexpected and all("shortcut" in name for name in missing)
    return net.eval()


def job(depth: int, folder: Path, test: bool = True, option: str = "A", calibration: int = 512) -> planish.Workload:
    """The benchmark's job: 45,000 images to train on, 5,000 to validate, 5,000 of the test set; the first of the former calibrate."""
    x, y = images(folder / "cifar10_train.tar.xz")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, kept = order[:5000], order[5000:]
    splits = {"train": (x[kept], y[kept]), "validation": (x[held], y[held])}
    if test:
        splits["test"] = images(folder / "cifar10_test.tar.xz")
    return planish.Workload(
        model=resnet(depth, folder, option),
        example_inputs=(x[:1],),
        calibration=[x[kept[:calibration]]],
        metric="accuracy",
        name=f"resnet{depth}",
        **{name: torch.utils.data.TensorDataset(*pair) for name, pair in splits.items()},
    )

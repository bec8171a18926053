"""Spoken digits and small recurrent nets for the benchmarks: read from `--data DIR` (or PLANISH_DATA), never shipped with the project."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import wavfile
from torch import nn
from torch.nn import functional as F

RATE, FRAME, HOP, BANDS, STEPS = 8000, 256, 160, 40, 40
"""Samples per second, samples of a frame and between frames, mel bands, frames of a recording (0.8 s; what is longer is cut)."""
_TEST, _VALIDATION = range(5), range(5, 10)
"""Takes of each digit by each of six speakers; the other 40 are trained on."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Heard:
    """Recordings: features `[n, STEPS, BANDS]`, of mean 0 and deviation 1 over the training split, and the digits."""

    features: torch.Tensor
    digits: torch.Tensor


class Digits(nn.Module):
    """Two recurrent layers and a classifier of their mean over time: the last state alone has heard much silence."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.rnn = (nn.LSTM if cell == "lstm" else nn.GRU)(BANDS, hidden, 2, batch_first=True)
        self.out = nn.Linear(hidden, 10)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(features)[0].mean(1))


def mel_bands() -> Floats:
    """Triangles over the bins of a spectrum, equally wide in mel: `[BANDS, FRAME // 2 + 1]`."""
    most = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, most, BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, FRAME // 2 + 1)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(sound: NDArray[np.float64]) -> Floats:
    """Logarithms of the power in each band, `[STEPS, BANDS]`; silence behind what is shorter."""
    sound = sound / max(float(np.abs(sound).max()), 1.0)
    length = FRAME + HOP * (STEPS - 1)
    sound = np.pad(sound[:length], (0, max(0, length - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames)) ** 2
    return np.log(power @ mel_bands().T + 1e-4).astype(np.float32)


def recordings(folder: Path) -> dict[str, Heard]:
    """ "train", "validation" and "test", by takes: every speaker is in each."""
    rows: dict[str, list[tuple[Floats, int]]] = {"train": [], "validation": [], "test": []}
    with tarfile.open(folder / "fsdd.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".wav") else None
            if file is None:
                continue
            digit, _, take = Path(member.name).stem.split("_")
            split = "test" if int(take) in _TEST else "validation" if int(take) in _VALIDATION else "train"
            _, sound = wavfile.read(io.BytesIO(file.read()))
            rows[split].append((log_mel(sound.astype(np.float64)), int(digit)))
    stacked = {name: np.stack([features for features, _ in found]) for name, found in rows.items()}
    mean, deviation = stacked["train"].mean((0, 1)), stacked["train"].std((0, 1))
    return {
        name: Heard(torch.from_numpy((features - mean) / deviation), torch.tensor([digit for _, digit in rows[name]]))
        for name, features in stacked.items()
    }


def trained(cell: str, hidden: int, heard: Heard, epochs: int) -> Digits:
    """A net after so many epochs: AdamW, one cycle of the rate, gradients clipped, features noised and shifted by up to 5 frames."""
    torch.manual_seed(0)
    net, batch = Digits(cell, hidden), 64
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = len(heard.digits) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(heard.digits))[: steps * batch].split(batch):
            shift = int(torch.randint(6, ()))
            features = heard.features[rows]
            features = torch.cat([features[:, shift:], features[:, -1:].expand(-1, shift, -1)], 1)
            loss = F.cross_entropy(net(features + 0.1 * torch.randn_like(features)), heard.digits[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return net.eval()

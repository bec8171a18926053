"""Silero's voice detector and speech in noise for the benchmarks: read from `--data DIR` (or PLANISH_DATA), never shipped with the project."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import nn
from torch.nn import functional as F

import planish

RATE, CHUNK, CONTEXT, HIDDEN = 16000, 512, 64, 128
"""Samples per second, new samples of a call, samples of the call before that it sees again, numbers in each of its two states."""
STATE = {"h": "h_next", "c": "c_next"}
_DECIDED = 0.5
_QUIET_S, _LOUDNESS_DB, _NOISE_DB = (0.2, 1.2), (-10.0, 10.0), (5.0, 30.0)
Audio = NDArray[np.float32]


class Silero(nn.Module):
    """One step for a chunk of 32 ms: samples `[n, 64 + 512]` and states `[n, 128]` to the probability of speech `[n, 1]` and the next states."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, HIDDEN)
        self.final_conv = nn.Conv1d(HIDDEN, 1, 1)

    def forward(self, audio: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        # Any length up to this would do; that it is this one lets the program be written for its sizes.
        x = F.pad(audio.unflatten(1, (1, CONTEXT + CHUNK)), (0, CONTEXT), mode="reflect")
        real, imaginary = self.stft_conv(x).split(129, 1)
        x = torch.sqrt(real * real + imaginary * imaginary)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        h_next, c_next = self.lstm_cell(x.flatten(1), (h, c))
        p = torch.sigmoid(self.final_conv(F.relu(h_next).unsqueeze(-1)))
        return {"probability": p.flatten(1), "h_next": h_next, "c_next": c_next}


def silero(folder: Path) -> Silero:
    """The published weights."""
    net = Silero()
    net.load_state_dict(load_file(folder / "silero_vad_16k.safetensors"))
    return net.eval()


def chunks(sound: Audio) -> Audio:
    """What each call sees: `[..., n, 64 + 512]` of sounds `[..., n * 512]`, with silence before the first."""
    new = sound.reshape(*sound.shape[:-1], -1, CHUNK)
    before = np.concatenate([np.zeros_like(new[..., :1, -CONTEXT:]), new[..., :-1, -CONTEXT:]], -2)
    return np.concatenate([before, new], -1)


def stepped(predict: Callable[[Any], Any], heard: Audio) -> tuple[Audio, Audio, Audio]:
    """A net stepped through sequences side by side, each fed its own states.

    Args:
        predict: inputs as a dict to outputs as a dict.
        heard: `[sequences, n, 64 + 512]`.

    Returns:
        Probabilities `[sequences, n]`, and the states that each call was given, `[sequences, n, 128]` each.
    """
    shape = heard.shape[0], heard.shape[1], HIDDEN
    p, hs, cs = np.empty(shape[:2], np.float32), np.empty(shape, np.float32), np.empty(shape, np.float32)
    h = c = np.zeros((shape[0], HIDDEN), np.float32)
    for i in range(shape[1]):
        hs[:, i], cs[:, i] = h, c
        out = predict({"audio": np.ascontiguousarray(heard[:, i]), "h": h, "c": c})
        p[:, i] = np.asarray(out["probability"])[:, 0]
        h, c = (np.ascontiguousarray(out[name], dtype=np.float32) for name in ("h_next", "c_next"))
    return p, hs, cs


def in_torch(net: nn.Module) -> Callable[[Any], Any]:
    """`predict` of a module."""

    def predict(inputs: Any) -> Any:
        with torch.inference_mode():
            return net(**{name: torch.from_numpy(value) for name, value in inputs.items()})

    return predict


def agreement(found: Audio, wanted: Audio) -> float:
    """The share of chunks that are decided alike."""
    return float(((found > _DECIDED) == (wanted > _DECIDED)).mean())


def recordings(folder: Path) -> dict[bool, list[Audio]]:
    """Spoken digits at 16 kHz, each of loudness 1: False -> those to train on, True -> the test split (index 0 to 4)."""
    found: dict[bool, list[Audio]] = {False: [], True: []}
    with tarfile.open(folder / "fsdd.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".wav") else None
            if file is not None:
                rate, sound = wavfile.read(io.BytesIO(file.read()))
                sound = resample_poly(sound.astype(np.float64), RATE // rate, 1)
                sound /= np.sqrt(np.mean(np.square(sound)))
                found[int(member.name[:-4].rsplit("_", 1)[1]) < 5].append(sound.astype(np.float32))
    return found


def sequences(spoken: list[Audio], count: int, length: int, seed: int) -> Audio:
    """Digits of changing loudness between stretches of noise, all in noise of one level: `[count, length * 512]`.

    Half of the sequences are in white noise, half in brown (which has most of its power where speech has); the noise lies 5 to 30 dB
    below speech. Speech has a root mean square of 0.03 on average, as in a recording that is not clipped.
    """
    draw = np.random.default_rng(seed)
    out = np.empty((count, length * CHUNK), np.float32)
    for i in range(count):
        noise = draw.standard_normal(length * CHUNK)
        if i % 2:
            noise = np.cumsum(noise)
            noise -= np.convolve(noise, np.ones(1600) / 1600, "same")
        sound = noise * 10 ** (-draw.uniform(*_NOISE_DB) / 20) / np.sqrt(np.mean(np.square(noise)))
        at = int(RATE * draw.uniform(*_QUIET_S))
        while True:
            digit = spoken[draw.integers(len(spoken))]
            if at + len(digit) > len(sound):
                break
            sound[at : at + len(digit)] += digit * 10 ** (draw.uniform(*_LOUDNESS_DB) / 20)
            at += len(digit) + int(RATE * draw.uniform(*_QUIET_S))
        out[i] = 0.03 * sound
    return np.clip(out, -1, 1)


def job(net: Silero, heard: dict[str, Audio]) -> planish.Workload:
    """A job without labels: the outputs of single steps are learnt, with the states that the original had; sequences are judged.

    Args:
        heard: "train" and "validation", `[sequences, n, 64 + 512]` each. `evaluate` steps through "validation", and the agreement of its
            decisions with the original's is the quality.
    """
    predict = in_torch(net)
    judged, (wanted, _, _) = heard["validation"], stepped(predict, heard["validation"])
    _, h, c = stepped(predict, heard["train"])
    single = {"audio": heard["train"].reshape(-1, CONTEXT + CHUNK), "h": h.reshape(-1, HIDDEN), "c": c.reshape(-1, HIDDEN)}
    order = np.random.default_rng(0).permutation(len(single["h"]))
    rows = {name: torch.from_numpy(array[order]) for name, array in single.items()}
    return planish.Workload(
        model=net,
        example_inputs={name: value[:1] for name, value in rows.items()},
        train=[({name: value[i : i + 256] for name, value in rows.items()}, None) for i in range(0, len(order), 256)],
        evaluate=lambda predict: agreement(stepped(predict, judged)[0], wanted),
        state=STATE,
        name="silero",
        version=f"{len(order)} steps, {judged.shape[0]} sequences of {judged.shape[1]}",
    )

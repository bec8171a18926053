"""A small GPT-2 over characters for the benchmarks: trained on a text for some minutes, and kept so that running again is quick."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

CONTEXT = 128


class Decoder(nn.Module):
    """Characters `[n, length]` to logits of the next one `[n, length, characters]`; one tensor out, as the exporters like it."""

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.gpt(input_ids=tokens).logits


@dataclass(frozen=True)
class Text:
    """Numbered characters: the first nine tenths are for training and calibration, the rest is held out."""

    train: torch.Tensor
    held_out: torch.Tensor
    characters: int

    @classmethod
    def read(cls, path: Path) -> Text:
        """The characters of a file, numbered in their sorted order."""
        raw = path.read_text(encoding="utf-8")
        known = {character: number for number, character in enumerate(sorted(set(raw)))}
        numbers = torch.tensor([known[character] for character in raw])
        split = len(numbers) * 9 // 10
        return cls(numbers[:split], numbers[split:], len(known))

    def drawn(self, count: int, generator: torch.Generator, length: int = CONTEXT) -> torch.Tensor:
        """`[count, length]`: random stretches of the training part."""
        starts = torch.randint(len(self.train) - length, (count,), generator=generator)
        return torch.stack([self.train[start : start + length] for start in starts])

    def judged(self, count: int) -> torch.Tensor:
        """`[count, CONTEXT + 1]`: stretches of the held-out part, evenly spread."""
        starts = np.linspace(0, len(self.held_out) - CONTEXT - 1, count).astype(int)
        return torch.stack([self.held_out[start : start + CONTEXT + 1] for start in starts])


def gpt(characters: int, layers: int, width: int) -> nn.Module:
    """The net with random weights; the output layer is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=characters,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        use_cache=False,
        activation_function="gelu_pytorch_tanh",  # the same function as the default's, in one operator instead of eight
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return Decoder(GPT2LMHeadModel(config))


def trained(text: Text, cache: Path, minutes: float, layers: int = 4, width: int = 256) -> nn.Module:
    """The net after so many minutes of training, from the cache where it lies there."""
    model = gpt(text.characters, layers, width)
    kept = cache / f"gpt-{layers}x{width}-{minutes:g}min.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval()
    _train(model, text, 60 * minutes)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model.eval()


def _train(model: nn.Module, text: Text, seconds: float, batch: int = 8, rate: float = 2e-3) -> None:
    generator = torch.Generator().manual_seed(1)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98)
    )
    model.train()
    began, step = time.monotonic(), 0
    while (share := (time.monotonic() - began) / seconds) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        rows = text.drawn(batch, generator, CONTEXT + 1)
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {100 * share:.0f} % of the time, loss {loss.item():.3f}", flush=True)


def logits(predict: Callable[[np.ndarray], np.ndarray], rows: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """`[n * CONTEXT, characters]`, for rows `[n, CONTEXT + 1]`; `predict` gives them for `[n, CONTEXT]` numbers."""
    return torch.cat([torch.from_numpy(predict(part[:, :-1].numpy())).flatten(0, 1) for part in rows.split(batch)]).double()


def perplexity(found: torch.Tensor, rows: torch.Tensor) -> float:
    """Of the next characters of rows `[n, CONTEXT + 1]` by logits."""
    return math.exp(float(nn.functional.cross_entropy(found, rows[:, 1:].flatten())))


def divergence(original: torch.Tensor, found: torch.Tensor) -> float:
    """The mean Kullback-Leibler divergence of predictions from the original's, in nats: it tells apart what perplexity cannot."""
    before, after = original.log_softmax(1), found.log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())

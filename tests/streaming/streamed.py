"""A small Llama, written as safetensors and built without weights; also run as a script, by tests that limit a process of their own."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import planish

VOCABULARY = 64
HIDDEN = 1
"""As wide as the stream, in the large net: the second moments of a wider layer would be most of the memory."""


class Decoder(nn.Module):
    """Tokens `[n, length]` to logits `[n, length, VOCABULARY]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits  # type: ignore[no-any-return]


def llama(layers: int = 2, width: int = 64, tied: bool = False, hidden: int = 3) -> nn.Module:
    """The net with random weights; feed-forward layers are `hidden` times as wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=hidden * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    return Decoder(LlamaForCausalLM(config))


def tokens(count: int = 48, length: int = 16) -> Tensor:
    """Samples that calibrate."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))


def job(build: Callable[[], nn.Module], samples: Tensor | None = None) -> planish.Workload:
    """The job of a net that is built without its weights."""
    given = tokens() if samples is None else samples
    return planish.Workload(model=build, example_inputs=(given[:1],), calibration=[given], name="llama")


def write(path: Path, layers: int, width: int) -> int:
    """A file of random weights, one tensor after the other, as `llama(layers, width)` names them; its bytes."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in llama(layers, width, hidden=HIDDEN).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    drawn = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = drawn.standard_normal(shape, dtype=np.float32)
            file.write((values / np.sqrt(shape[-1]) if len(shape) > 1 else 1 + 0.1 * values).astype(np.float32).tobytes())
    return end


def main(mode: str, folder: Path, layers: int, width: int, spare: int) -> None:
    """Shrink, or load at once, what lies in a folder, with at most `spare` bytes more than the process has once everything is imported.

    The limit is on private memory that may be written to: heap, stacks and anonymous maps. Mapped files do not count.
    """
    from planish.streaming.shrink import shrink

    torch.set_num_threads(1)
    shrink(
        job(lambda: llama(hidden=HIDDEN)), folder / "small", folder / "warm.shrunk", overwrite=True
    )  # what is imported late, and the allocator's pools
    used = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + spare, 1024 * used + spare))
    print("limited", flush=True)
    if mode == "at once":
        from safetensors.torch import load_file

        net = llama(layers, width, hidden=HIDDEN)
        net.load_state_dict(load_file(folder / "large" / "model.safetensors"))
        return
    found = shrink(job(lambda: llama(layers, width, hidden=HIDDEN), tokens(16)), folder / "large", folder / "net.shrunk")
    print(json.dumps(found.to_json()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))

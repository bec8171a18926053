"""Patches against the convolution itself, and the ridge against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planish.graph.capture import capture
from planish.graph.contraction import Contraction, contraction
from planish.graph.moments import Moments
from planish.graph.replay import Replay
from planish.prune.least_squares import fit, ridge

LAYERS = {
    "linear": (nn.Linear(5, 3), (2, 4, 5)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding=(1, 2)), (2, 4, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (2, 4, 6, 6)),
    "conv1d": (nn.Conv1d(4, 6, 5, padding=2), (2, 4, 11)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 6, 4)),
}


def found(layer: nn.Module, example: torch.Tensor) -> tuple[Replay, Contraction]:
    graph = capture(nn.Sequential(layer), (example,))
    replay = Replay(graph.module)
    parameters = dict(graph.module.named_parameters())
    (operator,) = [o for node in replay.nodes if (o := contraction(node, parameters)) is not None]
    return replay, operator


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weight_times_columns_is_the_output(name: str, layout: torch.memory_format) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    _, operator = found(layer, x)
    output, weight = layer(x).detach(), layer.weight.detach()
    positions = operator.draw(output, 10**6, torch.Generator())
    columns = operator.columns(x, weight, positions)
    made = columns @ weight.reshape(operator.groups, -1, columns.shape[2]).transpose(1, 2)
    made = made.movedim(0, 1).flatten(1) + (layer.bias.detach() if layer.bias is not None else 0)
    assert len(made) == output.numel() // len(weight)
    torch.testing.assert_close(made, operator.rows(output, positions), atol=1e-5, rtol=1e-5)


def test_what_is_no_contraction() -> None:
    graph = capture(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU()), (torch.randn(2, 3, 4, 4),))
    parameters = dict(graph.module.named_parameters())
    assert all(contraction(node, parameters) is None for node in graph.module.graph.nodes)


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    total = Moments(1, x.shape[1], y.shape[1])
    for rows in range(0, len(x), 37):
        total.add(x[None, rows : rows + 37], y[rows : rows + 37])
    return total


def test_ridge_finds_the_map_and_its_intercept() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator) + 3
    weight = torch.randn(2, 4, generator=generator)
    total = moments(x, x @ weight.T + torch.tensor([5.0, -7.0]))
    second = total.second(centered=True)
    solved = ridge(second[0], second[1], torch.zeros(1, 2, 4), 1e-9)
    torch.testing.assert_close(solved[0].float(), weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(total.offset(solved).float(), torch.tensor([5.0, -7.0]), atol=1e-2, rtol=1e-2)
    zero = torch.zeros(1, 2, 4, dtype=torch.float64)
    assert total.error(solved, total.offset(solved)) < 1e-4 * total.error(zero, total.offset(zero))


def test_the_strength_is_what_serves_held_out_rows() -> None:
    # 20 rows for 16 columns of pure noise: every fit is worse than the present weights, which are the truth.
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 16, generator=generator), torch.randn(1, 2, 16, generator=generator).double()
    noise = 3 * torch.randn(40, 2, generator=generator)
    train, held_out = moments(x[:20], x[:20] @ weight[0].T.float() + noise[:20]), moments(x[20:], x[20:] @ weight[0].T.float() + noise[20:])
    assert torch.equal(fit(train, held_out, weight, (1e-6, 1e-4), centered=True), weight)
    truth = moments(x, x @ weight[0].T.float())
    torch.testing.assert_close(fit(truth, truth, torch.zeros_like(weight), (1.0, 1e-6), centered=True), weight, atol=1e-3, rtol=1e-3)


def test_removal_is_that_of_optimal_brain_surgery() -> None:
    # Regression on the survivors equals w - w_S ((H^-1)_SS)^-1 (H^-1)_S: with H the Gram matrix (OBC, equation 3).
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] += x[:, 4]
    weight, gone, stay = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), [1, 2], [0, 3, 4, 5]
    gram = (x.T @ x)[None] / len(x)
    cross = gram @ weight.T
    solved = ridge(gram[:, stay][:, :, stay], cross[:, stay], weight[None][:, :, stay], 1e-12)[0]
    inverse = torch.linalg.inv(gram[0])
    update = weight - weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
    torch.testing.assert_close(solved, update[:, stay], atol=1e-8, rtol=1e-8)


def test_a_strong_pull_keeps_the_weights_and_dead_inputs_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x, current = torch.randn(50, 3, generator=generator), torch.randn(1, 2, 3, generator=generator)
    gram, cross, _ = moments(x, torch.randn(50, 2, generator=generator)).second(centered=False)
    torch.testing.assert_close(ridge(gram, cross, current, 1e9).float(), current, atol=1e-4, rtol=1e-4)
    zero = torch.zeros_like(gram)
    torch.testing.assert_close(ridge(zero, torch.zeros_like(cross), current, 1e-3), current.double())

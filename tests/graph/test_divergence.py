"""The label-free loss looks along the axis of classes, wherever the shape puts it."""

from __future__ import annotations

import pytest
import torch

from planish.graph.divergence import divergence

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), 1), ((6, 7, 5), 2), ((6, 5, 4, 4), 1)])
def test_a_shift_of_all_classes_costs_nothing_and_one_of_a_class_does(shape: tuple[int, ...], axis: int) -> None:
    out = torch.randn(shape, generator=GENERATOR)
    measure = divergence([out])
    positions = [size if i != axis else 1 for i, size in enumerate(shape)]
    shifted = out + torch.randn(positions, generator=GENERATOR)
    assert measure.kinds == ("logits",)
    torch.testing.assert_close(measure.per_sample([shifted], [out]), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        measure.per_sample([2 * out], [out]),
        torch.nn.functional.kl_div((2 * out).log_softmax(axis), out.log_softmax(axis), log_target=True, reduction="none")
        .sum(axis)
        .reshape(6, -1)
        .mean(1),
    )


def test_the_curvature_probe_is_that_of_the_class_axis() -> None:
    out = torch.randn((4, 5, 3, 3), generator=GENERATOR, requires_grad=True)
    measure = divergence([out.detach()])
    probe = measure.curvature_probe([out], torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(probe, out)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4, 3, 3), atol=1e-5, rtol=0)

"""Distillation losses in closed form, and what each output is taken for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from planish.distill.losses import Distillation, distillation, guess_kinds

G = torch.Generator().manual_seed(0)
LOGITS, OTHER = torch.randn(16, 5, generator=G), torch.randn(16, 5, generator=G)
LABELS = np.arange(16) % 5


@pytest.mark.parametrize(
    ("metric", "shape", "targets", "kind"),
    [
        ("accuracy", (16, 5), None, "classes"),
        ("agreement", (16, 5), None, "classes"),
        ("perplexity", (4, 7, 5), None, "classes"),
        ("function", (16, 5), LABELS, "classes"),
        ("function", (16, 5), LABELS.astype(np.float32), "values"),
        ("function", (16, 5), None, "values"),
        ("rmse", (16, 5), LABELS, "values"),
        ("rmse", (16, 1), None, "values"),
        ("accuracy", (16, 1), LABELS, "values"),
        ("cosine", (16, 5), None, "embedding"),
        ("spearman", (16, 5), None, "embedding"),
        ("spearman", (16,), None, "values"),
    ],
)
def test_kinds(metric: str, shape: tuple[int, ...], targets: np.ndarray | None, kind: str) -> None:
    assert guess_kinds(metric, [torch.zeros(shape)], targets) == (kind,)


def test_further_outputs_are_values_and_integers_teach_nothing() -> None:
    outputs = [LOGITS, LOGITS, torch.zeros(16, dtype=torch.int64)]
    assert guess_kinds("accuracy", outputs, None) == ("classes", "values", "none")
    loss = distillation("accuracy", outputs, None)
    assert loss([OTHER, LOGITS, outputs[2]], outputs) == loss([OTHER, LOGITS, outputs[2] + 1], outputs)


@pytest.mark.parametrize("metric", ["accuracy", "cosine", "rmse"])
def test_equal_outputs_cost_nothing_and_others_something(metric: str) -> None:
    loss = distillation(metric, [LOGITS], None)
    assert float(loss([LOGITS], [LOGITS])) == pytest.approx(0, abs=1e-6)
    assert float(loss([OTHER], [LOGITS])) > 0.1


def test_kl_equals_torchs_and_its_gradient_is_the_softened_difference() -> None:
    student = OTHER.clone().requires_grad_(True)
    value = Distillation(("classes",), (1.0,), temperature=3.0)([student], [LOGITS])
    expected = F.kl_div(F.log_softmax(OTHER / 3, 1), F.log_softmax(LOGITS / 3, 1), log_target=True, reduction="batchmean") * 9
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, 3 * (F.softmax(OTHER / 3, 1) - F.softmax(LOGITS / 3, 1)) / 16)


def test_values_are_scaled_by_the_teachers_variance() -> None:
    loss = distillation("rmse", [LOGITS * 100], None)
    assert float(loss([LOGITS * 100 + LOGITS.std() * 10], [LOGITS * 100])) == pytest.approx(0.01, rel=0.3)
    mean = (LOGITS * 100).mean(0).expand(16, -1)
    assert float(loss([mean], [LOGITS * 100])) == pytest.approx(1.0)
    assert distillation("rmse", [torch.zeros(4, 2)], None).scales == (1.0,)
    assert distillation("rmse", [torch.full((1, 2), 3.0)], None).scales == (9.0,)


def test_labels_are_mixed_in_where_they_fit() -> None:
    loss = Distillation(("classes",), (1.0,), temperature=2.0, label_weight=0.25)
    alone = loss([OTHER], [LOGITS])
    targets = torch.from_numpy(LABELS)
    torch.testing.assert_close(loss([OTHER], [LOGITS], targets), 0.75 * alone + 0.25 * F.cross_entropy(OTHER, targets))
    torch.testing.assert_close(loss([OTHER], [LOGITS], targets[:, None]), loss([OTHER], [LOGITS], targets))
    misfits: list[Tensor] = [targets.double(), torch.zeros(16, 2, dtype=torch.int64), torch.full((16,), -100)]
    for misfit in misfits:
        assert loss([OTHER], [LOGITS], misfit) == alone


def test_labels_of_tokens_and_pixels() -> None:
    loss = Distillation(("classes",), (1.0,), label_weight=1.0)
    tokens, pixels = torch.randn(2, 7, 5, generator=G), torch.randn(2, 5, 3, 3, generator=G)
    wanted = torch.randint(0, 5, (2, 7), generator=G)
    torch.testing.assert_close(loss([tokens], [tokens], wanted), F.cross_entropy(tokens.flatten(0, 1), wanted.flatten()))
    mask = torch.randint(0, 5, (2, 3, 3), generator=G)
    torch.testing.assert_close(loss([pixels], [pixels], mask), F.cross_entropy(pixels, mask))

"""How far a changed graph's outputs are from the original's, without labels: KL for class logits, normalised squared error otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.errors import DataError
from planish.metrics import class_axis


@dataclass(frozen=True)
class Divergence:
    """A label-free loss between flat outputs; made once from the original's outputs.

    Args:
        kinds: for each output "logits" (KL of the softmax at temperature 1), "values" (squared error over variance) or "" (left out).
        scales: for each output, the total variance over its last axis (one number) that a squared error is divided by; 1 for logits.
    """

    kinds: tuple[str, ...]
    scales: tuple[float, ...]

    def per_sample(self, outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """The divergence of each sample, summed over outputs and averaged over positions.

        Args:
            outputs: flat outputs of the changed graph, sample axis 0.
            reference: the original's, same shapes.

        Returns:
            [samples], nats for logits, a share of the variance for values.
        """
        total = torch.zeros(reference[0].shape[0])
        for kind, scale, new, old in zip(self.kinds, self.scales, outputs, reference, strict=True):
            if kind == "logits":
                axis = class_axis(old.shape)
                target = old.float().log_softmax(axis)
                each = (target.exp() * (target - new.float().log_softmax(axis))).sum(axis)
            elif kind == "values":
                each = _last_axis(new - old).square().sum(-1) / scale
            else:
                continue
            total = total + each.reshape(len(each), -1).mean(1)
        return total

    def curvature_probe(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """A random scalar l of the outputs with E[grad l grad l^T] equal to the Hessian of the divergence, summed over samples.

        For logits z with p = softmax(z) it is l = v . z with v = sqrt(p) * e - p (sqrt(p) . e), e standard normal, since
        E[v v^T] = diag(p) - p p^T: the Fisher information of the softmax, as sampling labels from p gives it, but without the rare
        labels that make that estimate noisy. For values it is l = sqrt(2 / scale) e . z. Samples are independent and of mean zero,
        so the squared gradient of a sum over samples is an unbiased estimate of the sum of the squared gradients.

        Args:
            outputs: flat outputs with gradients.
            generator: of the probe.

        References:
            Martens 2020, New insights and perspectives on the natural gradient method, section 9 (the generalised Gauss-Newton matrix).
        """
        total = torch.zeros(())
        for kind, scale, value in zip(self.kinds, self.scales, outputs, strict=True):
            if not kind:
                continue
            value = _last_axis(value.movedim(class_axis(value.shape), -1) if kind == "logits" else value)
            positions = value[0].numel() // value.shape[-1]
            noise = torch.randn(value.shape, generator=generator)
            if kind == "logits":
                p = value.detach().softmax(-1)
                direction = p.sqrt() * noise - p * (p.sqrt() * noise).sum(-1, keepdim=True)
            else:
                direction = noise * (2.0 / scale) ** 0.5
            total = total + (direction * value).sum() / positions**0.5
        return total


def _last_axis(value: Tensor) -> Tensor:
    return value[:, None] if value.dim() == 1 else value


def divergence(outputs: Sequence[Tensor], kind: str | None = None) -> Divergence:
    """The divergence that suits the original's outputs.

    Args:
        outputs: flat outputs of the original on some calibration samples, sample axis 0.
        kind: "logits" or "values" for all outputs; None guesses for each: "logits" where the axis of classes has at least two entries
            and its rows are not normalised to length one, "values" otherwise. Integer outputs are left out.

    Raises:
        DataError: an output is not finite, or no output is a floating-point tensor with a sample axis.
    """
    kinds: list[str] = []
    scales: list[float] = []
    for index, value in enumerate(outputs):
        if not value.is_floating_point() or value.dim() == 0 or value.shape[0] != outputs[0].shape[0]:
            kinds.append("")
            scales.append(1.0)
            continue
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"calibration: the original's outputs must be finite; output {index} is not; check the calibration data and the weights"
            )
        flat = _last_axis(value.movedim(class_axis(value.shape), -1) if value.dim() > 1 else value).float()
        norms = flat.norm(dim=-1)
        guess = "values" if flat.shape[-1] < 2 or value.dim() < 2 or bool(((norms - 1).abs() < 1e-3).all()) else "logits"
        chosen = kind or guess
        rows = flat.reshape(-1, flat.shape[-1])
        variance = float((rows - rows.mean(0)).square().sum(-1).mean())
        if variance <= 1e-12:
            variance = max(float(rows.square().sum(-1).mean()), 1e-12)
        kinds.append(chosen)
        scales.append(1.0 if chosen == "logits" else variance)
    if not any(kinds):
        raise DataError("calibration: at least one output must be a floating-point tensor whose axis 0 is the sample; none is")
    return Divergence(tuple(kinds), tuple(scales))

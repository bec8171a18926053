"""The moving average against its closed form."""

from __future__ import annotations

import pytest
import torch

from planish.train.averaging import Average, write_


def test_average_is_the_normalised_geometric_sum() -> None:
    weight = torch.zeros(3)
    average = Average([weight], 0.9)
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    for value in values:
        write_([weight], [value])
        average.update()
    shares = torch.tensor([0.9 ** (6 - k) for k in range(7)])
    torch.testing.assert_close(average.values()[0], (shares[:, None] * values).sum(0) / shares.sum())


def test_average_of_a_constant_is_the_constant_from_the_first_update() -> None:
    weight = torch.full((2,), 3.0, requires_grad=True)
    average = Average([weight], 0.999)
    assert average.values()[0].tolist() == [3.0, 3.0]
    average.update()
    assert average.values()[0].tolist() == pytest.approx([3.0, 3.0])
    assert not average.values()[0].requires_grad

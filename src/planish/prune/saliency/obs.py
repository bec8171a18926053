"""Structured optimal brain surgeon: units go one at a time, and what reads them makes up for each as well as it can before the next."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planish.graph.graph import Analysis, Graph, Group
from planish.graph.moments import Moments
from planish.prune.contract import Material
from planish.prune.readers import inputs_of_readers
from planish.prune.saliency.magnitude import Magnitude
from planish.prune.units import columns, finite

_DAMPING = 1e-3
_STILL = 1e-9
_STEPS = 256
_FORGET = 3
"""Units that went are cut out of the matrices when they are more than a third of those that are left: few copies, and updates of less and less."""


@dataclass
class Reader:
    """A linear map while its columns go: W^T W [c, c], the inverse of the damped H = E[x x^T] [c, c], columns of each unit [units, m], and
    whether none of them ever varies [units]."""

    power: Tensor
    inverse: Tensor
    columns: Tensor
    energy: float
    is_still: Tensor

    def costs(self, units: Tensor) -> Tensor:
        """Of each of these units: the output's relative squared error if it went and the rest were refitted."""
        at = self.columns[units]  # [k, m]
        rows, others = at[:, :, None], at[:, None, :]
        errors: Tensor = (torch.linalg.inv(self.inverse[rows, others]) * self.power[rows, others]).sum((1, 2)) / self.energy
        return errors

    def remove(self, units: Tensor) -> None:
        """Take the columns of some units away: what is left is the system without them. Each matrix is read and written once."""
        at = self.columns[units].reshape(-1)
        inner = at[:, None], at
        reach = torch.linalg.solve(self.inverse[inner], self.inverse[at])  # R = ((H^-1)_SS)^-1 (H^-1)_S,:
        moved = self.power[:, at] - reach.T @ self.power[inner] / 2
        self.power.addmm_(torch.cat((moved, reach.T), 1), torch.cat((reach, moved.T)), alpha=-1)  # (1 - R^T) P (1 - R)
        self.inverse.addmm_(self.inverse[:, at], reach, alpha=-1)

    def forget(self, units: Tensor) -> None:
        """Keep no columns of units that were removed: nothing asks for them again, and what is left is updated in less time."""
        kept = torch.ones(len(self.power), dtype=torch.bool)
        kept[self.columns[units].reshape(-1)] = False
        self.power = self.power[kept][:, kept]
        self.inverse = self.inverse[kept][:, kept]
        self.columns = kept.cumsum(0)[self.columns] - 1


class SurgeonOrder(Magnitude):
    """s_u = the error that had been made when unit u went: the unit that costs least goes, its readers are updated exactly, and again.

    With W a reader's weight, H = E[(x - mean)(x - mean)^T] + lambda I over the columns that it reads, and S the columns of unit u:

        rho_S = sum_i W_i,S ((H^-1)_SS)^-1 W_i,S^T,  relative to E|W (x - mean)|^2 and added over the group's readers;
        W -= W_:,S ((H^-1)_SS)^-1 (H^-1)_S,:  and  H^-1 -= H^-1_:,S ((H^-1)_SS)^-1 (H^-1)_S,:

    Scores never fall along the order, so that they rank units as they went. Groups that no convolution or linear map reads get
    `Magnitude`'s scores. The weights of every width are made where they are wanted, by `sensitivities` and `compensate`: the regression
    on all survivors at once has the same optimum as the updates one after another.

    Args:
        samples: calibration samples.

    References:
        Kurtic et al. 2023, ZipLM, section 3.1; Frantar and Alistarh 2022, Optimal Brain Compression, theorem 1.
    Differs:
        several readers of one group are pruned together; second moments are about the mean, since biases are refitted too; of a group of
        more than 256 units several go at a time, so that there are no more than 256 steps.
    """

    needs: frozenset[str] = frozenset({"data"})

    def __init__(self, samples: int = 256) -> None:
        self.samples = samples

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a group with activations or weights that are not finite gets NaN."""
        found = exact_scores(graph, analysis, material, self.samples)
        self.others = [name for name in analysis.groups if name not in found]
        return {**super().scores(graph, analysis, material, seed), **found}


@torch.no_grad()
def exact_scores(
    graph: Graph, analysis: Analysis, material: Material, samples: int, most_work: float = math.inf
) -> dict[str, NDArray[np.float64]]:
    """The scores of `SurgeonOrder` for the groups that a convolution or linear map reads.

    Args:
        graph: left as it is.
        analysis: of that graph.
        material: its split is read.
        samples: calibration samples.
        most_work: multiply-accumulates, in double precision, in all; groups that cost least are taken first, and those beyond are left out.
    """
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    seen = inputs_of_readers(graph, analysis, material.split, samples)
    work = {
        name: sum(
            parameters[weight][0].numel() ** 2 * (parameters[weight][0].numel() + 2 * parameters[weight].shape[0]) for weight in weights
        )
        for name, weights in seen.readers.items()
        if weights
    }
    cheapest_first = sorted(work, key=lambda name: (work[name], name))
    spent = dict(zip(cheapest_first, itertools.accumulate(work[name] for name in cheapest_first), strict=True))
    found: dict[str, NDArray[np.float64]] = {}
    for name in (name for name in analysis.groups if name in spent and spent[name] <= most_work):
        group = analysis.groups[name]
        given = [reader_of(parameters[weight], seen.moments[weight], group, group.unit_of[weight, 1]) for weight in seen.readers[name]]
        readers = [reader for reader in given if reader is not None]
        is_whole = len(readers) == len(given)
        found[name] = finite(in_turn(readers, group.units)) if is_whole else np.full(group.units, np.nan)
    return found


def reader_of(weight: Tensor, moments: Moments, group: Group, unit_of: NDArray[np.int64]) -> Reader | None:
    """A reader before anything went; None where its weight or what it reads is not finite."""
    gram = moments.second(centered=True)[0][0]
    rows = weight.double().reshape(len(weight), -1)
    if not bool(gram.isfinite().all() and rows.isfinite().all()):
        return None
    at = torch.from_numpy(columns(unit_of, group.units, weight[0, 0].numel()))
    varies = gram.diagonal() > _STILL * gram.diagonal().mean()
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * (_DAMPING * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    energy = max(float(((rows @ gram) * rows).sum()), torch.finfo(torch.float32).tiny)
    return Reader(rows.T @ rows, torch.linalg.inv(gram), at, energy, ~varies[at].any(1))


def in_turn(readers: list[Reader], units: int) -> NDArray[np.float64]:
    """The error made when each unit went; units that never vary cost nothing, whatever else costs nothing for want of samples."""
    is_still = torch.stack([reader.is_still for reader in readers]).all(0)
    left, reached, found = (~is_still).nonzero()[:, 0], 0.0, np.zeros(units)
    at_once, gone = -(-units // _STEPS), left[:0]
    while len(left):
        costs = torch.stack([reader.costs(left) for reader in readers]).sum(0)
        order = costs.argsort(stable=True)
        for place, cost in zip(left[order[:at_once]].tolist(), costs[order[:at_once]].tolist(), strict=True):
            reached = max(reached * (1 + 1e-9), cost)  # units that cost the same are told apart by when they went
            found[place] = reached
        going, left = left[order[:at_once]], left[order[at_once:].sort().values]
        if not len(left):
            break
        for reader in readers:
            reader.remove(going)
        gone = torch.cat((gone, going))
        if len(gone) > len(left) / _FORGET:
            for reader in readers:
                reader.forget(gone)
            gone = gone[:0]
    return found

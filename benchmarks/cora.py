"""Cora and its graph nets for the benchmarks: read from `--data DIR` (or PLANISH_DATA), never shipped with the project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish

NET_SEED = 0
EPOCHS, RATE, DECAY = 200, 0.01, 5e-4
"""Of Kipf and Welling 2017, as the layers' authors use them all; of every fifth epoch the best on validation is kept."""


@dataclass(frozen=True)
class Citations:
    """The graph.

    Args:
        x: words of each paper, `[2708, 1433]`, a row's sum being 1.
        edges: `[2, edges]`, each citation in both directions.
        labels: one of seven fields, `[2708]`.
        train, validation, test: numbers of nodes.
    """

    x: Tensor
    edges: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def citations(folder: Path) -> Citations:
    """Cora as in Yang et al. 2016."""
    with np.load(folder / "cora.npz") as file:
        words = scipy.sparse.csr_array((file["data"], file["indices"], file["indptr"]), shape=tuple(file["shape"])).toarray()
        edges = torch.from_numpy(file["edges"].T)
        splits = {name: torch.from_numpy(file[name]) for name in ("labels", "train", "validation", "test")}
    x = torch.from_numpy(words.astype(np.float32))
    edges = torch.cat([edges, edges.flip(0)], 1).unique(dim=1)
    return Citations(x / x.sum(1, keepdim=True).clamp(min=1), edges, **splits)


class Convolution(nn.Module):
    """A graph convolution as PyTorch Geometric's GCNConv computes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.lin.weight)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        nodes = x.size(-2)
        source, target = torch.cat([edges, torch.arange(nodes).expand(2, nodes)], 1)
        root = torch.zeros(nodes).index_add(0, target, torch.ones(target.size(0))) ** -0.5
        sent = (root[source] * root[target]).view(-1, 1) * self.lin(x).index_select(-2, source)
        index = target.view(1, -1, 1).expand_as(sent)
        return sent.new_zeros(x.size(0), nodes, sent.size(-1)).scatter_add(1, index, sent) + self.bias


class GraphNet(nn.Module):
    """Two layers over the graph that the net holds: features `[n, nodes, 1433]` to logits `[n, nodes, 7]`."""

    def __init__(self, kind: str, hidden: int, edges: Tensor) -> None:
        super().__init__()
        self.one, self.two = layers(kind, hidden)
        self.kind = kind
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind != "gat":
            return self.two(self._between(self.one(self._drop(x), self.edges)), self.edges)
        graphs, nodes = x.size(0), x.size(1)  # GATConv takes one graph: samples are put together as one
        edges = (self.edges.unsqueeze(1) + nodes * torch.arange(graphs).view(1, -1, 1)).flatten(1)
        y = self._between(self.one(self._drop(x.flatten(0, 1)), edges))
        return self.two(y, edges).unflatten(0, (graphs, nodes))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    def _between(self, x: Tensor) -> Tensor:
        return self._drop(F.elu(x) if self.kind == "gat" else F.relu(x))


def layers(kind: str, hidden: int) -> tuple[nn.Module, nn.Module]:
    """The two layers, from PyTorch Geometric where it is installed."""
    try:
        from torch_geometric.nn import GATConv, GCNConv, SAGEConv
    except ImportError:
        if kind != "gcn":
            raise SystemExit(f"{kind} needs PyTorch Geometric: pip install 'planish[graph]'") from None
        return Convolution(1433, hidden), Convolution(hidden, 7)
    if kind == "gat":
        return GATConv(1433, hidden // 8, heads=8), GATConv(hidden, 7)
    layer = {"gcn": GCNConv, "sage": SAGEConv}[kind]
    return layer(1433, hidden), layer(hidden, 7)


def trained(kind: str, hidden: int, data: Citations) -> nn.Module:
    """The net, trained on 140 labels."""
    torch.manual_seed(NET_SEED)
    net = GraphNet(kind, hidden, data.edges)
    optimizer = torch.optim.Adam(net.parameters(), RATE, weight_decay=DECAY)
    best, kept = -1.0, {}
    for epoch in range(EPOCHS):
        net.train()
        optimizer.zero_grad()
        F.cross_entropy(net(data.x[None])[0, data.train], data.labels[data.train]).backward()
        optimizer.step()
        if epoch % 5 != 4:
            continue
        net.eval()
        with torch.no_grad():
            found = accuracy(net, data, data.validation)
        if found > best:
            best, kept = found, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    return net.eval()


def accuracy(net: nn.Module, data: Citations, nodes: Tensor) -> float:
    """The share of these nodes whose field is the predicted one."""
    return float((net(data.x[None])[0, nodes].argmax(-1) == data.labels[nodes]).float().mean())


def samples(data: Citations, nodes: Tensor, parts: int, dropped: float = 0.0) -> torch.utils.data.TensorDataset:
    """The graph `parts` times, each with the labels of its share of `nodes`; all other nodes are ignored.

    Args:
        data: the graph.
        nodes: that have labels here.
        parts: samples; the bootstrap of a drop draws whole samples, so that there must be several.
        dropped: share of the words that are left out, others in each sample; then every sample has the labels of all `nodes`.
    """
    generator = torch.Generator().manual_seed(0)
    x = data.x.expand(parts, -1, -1)
    if dropped:
        x = x * (torch.rand(x.shape, generator=generator) >= dropped) / (1 - dropped)
    labels = torch.full((parts, len(data.x)), -100)
    for part, own in enumerate([nodes] * parts if dropped else nodes.chunk(parts)):
        labels[part, own] = data.labels[own]
    return torch.utils.data.TensorDataset(x, labels)


def job(kind: str, hidden: int, folder: Path) -> planish.Workload:
    """The benchmark's job: the usual 140, 500 and 1000 labels; recovery sees eight views of the graph with half of the words left out."""
    data = citations(folder)
    return planish.Workload(
        model=trained(kind, hidden, data),
        example_inputs=(data.x[None],),
        train=samples(data, data.train, 8, 0.5),
        validation=samples(data, data.validation, 5),
        test=samples(data, data.test, 10),
        metric="accuracy",
        name=f"cora-{kind}",
    )

"""Graph nets that gather along edges and scatter to nodes, with the operators that PyTorch Geometric's layers come to when they are traced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NODES = 9


def edges(nodes: int = NODES, seed: int = 0) -> Tensor:
    """A ring with chords, in both directions, and a self-loop at node 0: `[2, edges]`, sources first."""
    generator = torch.Generator().manual_seed(seed)
    ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    chords = torch.randint(0, nodes, (2, nodes), generator=generator)
    chords = chords[:, chords[0] != chords[1]]
    return torch.cat([ring, ring.flip(0), chords, torch.zeros(2, 1, dtype=torch.long)], 1)


def scatter_sum(values: Tensor, index: Tensor, count: int) -> Tensor:
    """The sum of the values `[n, edges, ...]` that go to each of `count` nodes."""
    shape = [1, -1, *[1] * (values.dim() - 2)]
    return values.new_zeros(values.shape[0], count, *values.shape[2:]).scatter_add_(1, index.view(shape).expand_as(values), values)


class GraphConvolution(nn.Module):
    """Kipf and Welling 2017: sums over neighbours, by the roots of both degrees; a self-loop replaces those that the graph has."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        count = x.size(-2)
        loops = torch.arange(count).view(1, -1).repeat(2, 1)
        source, target = torch.cat([edges[:, edges[0] != edges[1]], loops], 1)
        ones = torch.ones(source.size(0))
        root = ones.new_zeros(count).scatter_add_(0, target, ones).pow_(-0.5)
        root.masked_fill_(root == float("inf"), 0.0)
        weight = root[source] * root[target]
        x = self.linear(x).index_select(-2, source)
        return scatter_sum(weight.view(-1, 1) * x, target, count) + self.bias


class Sage(nn.Module):
    """Hamilton et al. 2017: the mean or the maximum over neighbours, and the node itself."""

    def __init__(self, inputs: int, outputs: int, maximum: bool) -> None:
        super().__init__()
        self.neighbours, self.own = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)
        self.maximum = maximum

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        count, sent = x.size(-2), x.index_select(-2, source)
        if self.maximum:
            index = target.view(1, -1, 1).expand_as(sent)
            met = sent.new_zeros(x.size(0), count, x.size(-1)).scatter_reduce_(1, index, sent, "amax", include_self=False)
        else:
            degree = sent.new_zeros(count).scatter_add_(0, target, sent.new_ones(target.size(0))).clamp_(min=1)
            met = scatter_sum(sent, target, count) / degree.view(1, -1, 1)
        return self.neighbours(met) + self.own(x)


class GraphAttention(nn.Module):
    """Velickovic et al. 2018: heads side by side, whose weights are a softmax over the neighbours of a node."""

    def __init__(self, inputs: int, outputs: int, heads: int) -> None:
        super().__init__()
        self.heads, self.outputs = heads, outputs
        self.linear = nn.Linear(inputs, heads * outputs, bias=False)
        self.source, self.target = (nn.Parameter(torch.randn(1, 1, heads, outputs)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads * outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        count = x.size(1)
        x = self.linear(x).view(-1, count, self.heads, self.outputs)
        score = (x * self.source).sum(-1).index_select(1, source) + (x * self.target).sum(-1).index_select(1, target)
        score = F.leaky_relu(score, 0.2)
        index = target.view(1, -1, 1).expand_as(score)
        highest = score.new_zeros(x.size(0), count, self.heads).scatter_reduce_(1, index, score, "amax", include_self=False)
        weight = (score - highest.index_select(1, target)).exp()
        weight = weight / (scatter_sum(weight, target, count) + 1e-16).index_select(1, target)
        sent = weight.unsqueeze(-1) * x.index_select(1, source)
        return scatter_sum(sent, target, count).view(-1, count, self.heads * self.outputs) + self.bias


class GraphNet(nn.Module):
    """Two layers over a graph that the net holds; features `[n, nodes, features]`, logits `[n, nodes, classes]`."""

    def __init__(self, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, two
        self.register_buffer("edges", edges())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x, self.edges)), self.edges)


class GraphsApart(nn.Module):
    """Graphs that differ from sample to sample, put together as one: GIN (Xu et al. 2019), the mean and the maximum over a graph's nodes.

    Numbers of nodes are taken modulo `NODES`, so that any integers `[n, edges, 2]` are edges.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 20))
        self.two = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        graphs, nodes = x.size(0), x.size(1)
        offset = torch.arange(graphs).view(-1, 1, 1) * nodes
        source, target = (edges % NODES + offset).flatten(0, 1).unbind(1)
        x = x.flatten(0, 1)
        for layer in (self.one, self.two):
            x = torch.relu(layer(x + torch.zeros_like(x).index_add_(0, target, x.index_select(0, source))))
        graph = torch.arange(graphs).view(-1, 1).expand(graphs, nodes).flatten()
        mean = x.new_zeros(graphs, x.size(1)).index_add_(0, graph, x) / nodes
        highest = x.new_zeros(graphs, x.size(1)).scatter_reduce_(0, graph.view(-1, 1).expand_as(x), x, "amax", include_self=False)
        return self.fc(torch.cat([mean, highest], 1))

"""Gathering and scattering by indices: which units may go, surgery equals masking, exported equals module; and graphs that a net holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import families
import graph_nets
import nets
from planish.errors import UsageError
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference, prune
from planish.runtimes.contract import get_runtime
from planish.runtimes.to_onnx import to_onnx
from planish.target import Target

ROWS = [0, 2, 5, 1, 2, 2]  # of six: the first four differ, 3 and 4 get nothing, 2 gets three


def wide(index: Tensor, like: Tensor) -> Tensor:
    return index.view(1, -1, 1).expand_as(like)


def reduced(how: str, include_self: bool) -> Callable[[Any, Tensor, Tensor], Tensor]:
    return lambda rows, x, y: x.scatter_reduce(1, wide(rows, y), y, how, include_self=include_self)


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scatter": lambda rows, x, y: x.scatter(1, wide(rows[:4], y[:, :4]), y[:, :4]),
    "scatter_value": lambda rows, x, y: (x + y).scatter(1, wide(rows, y), 0.5),
    "scatter_add": lambda rows, x, y: x.scatter_add(1, wide(rows, y), y),
    **{f"scatter_{how}_{self}": reduced(how, self) for how in ("sum", "mean", "amax", "amin", "prod") for self in (False, True)},
    "gather": lambda rows, x, y: (x * y).gather(1, wide(rows, y)),
    "index_add": lambda rows, x, y: x.index_add(1, rows, y),
    "index_copy": lambda rows, x, y: x.index_copy(1, rows[:4], y[:, :4]),
    "index_fill": lambda rows, x, y: (x + y).index_fill(1, rows, 0.5),
    "index_reduce": lambda rows, x, y: x.index_reduce(1, rows, y, "amax"),
    "index_put": lambda rows, x, y: torch.ops.aten.index_put(x, [None, rows[:4]], y[:, :4]),
    "index_put_sum": lambda rows, x, y: torch.ops.aten.index_put(x, [None, rows], y, True),
}
ONNX_HAS_NOT = {"index_reduce"}


class Scattering(nn.Module):
    """Two linear maps of the same rows, of which one is used on the other by indices."""

    def __init__(self, combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.other, self.fc = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 5)
        self.combine = combine
        self.register_buffer("rows", torch.tensor(ROWS))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.combine(self.rows, torch.tanh(self.net(x)), torch.tanh(self.other(x))))


def built(name: str) -> tuple[Graph, tuple[Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        example = (torch.randn(2, 6, 12),)
        return capture(Scattering(OPERATORS[name]).eval(), example), example


def close(found: tuple[Any, ...], expected: tuple[Tensor, ...]) -> bool:
    # three sums of at most 12 products each, and products of at most four factors in [-1, 1]: far below 1e-5 in float32
    return all(torch.allclose(torch.as_tensor(a), b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings(r"ignore:index_reduce\(\) is in beta")
@pytest.mark.parametrize("name", OPERATORS)
@torch.no_grad()
def test_rows_are_fixed_and_columns_are_tied(name: str, tmp_path: Path) -> None:
    graph, example = built(name)
    analysis = analyse(graph)
    assert {group.name: group.units for group in analysis.groups.values()} == {"net": 8}
    assert not analysis.unknown
    assert {parameter for parameter, _ in analysis.groups["net"].unit_of} >= {"net.weight", "other.weight", "fc.weight"}
    removed = {"net": [0, 3, 7]}
    pruned = prune(graph, analysis, removed).graph
    for batch in (1, 3):
        inputs = graph.signature.flatten(nets.resized(example, batch))
        assert close(pruned.module(*inputs), masked_reference(graph, analysis, removed, inputs))
    for number, one in enumerate((graph, pruned)):
        path = tmp_path / f"{number}.onnx"
        if name in ONNX_HAS_NOT:
            with pytest.raises(UsageError, match="must have an ONNX form"):
                to_onnx(one, path)
            continue
        to_onnx(one, path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            inputs = graph.signature.flatten(nets.resized(example, batch))
            found = session.run(None, {"x": inputs[0].numpy()})
            assert close(tuple(found), one.module(*inputs))


@pytest.mark.parametrize(
    ("combine", "operator"),
    [
        (lambda rows, x, y: x.scatter_add(1, rows.view(1, -1, 1).expand(len(x), 6, 4), y), "scatter_add"),  # the first four columns only
        (lambda rows, x, y: (x * y).gather(1, rows.view(1, -1, 1).expand(x.size(0), 6, 1)), "gather"),
        (lambda rows, x, y: torch.ops.aten.index_put(x, [None, (rows > 1)], y[:, :4]), "index_put"),
        (lambda rows, x, y: torch.ops.aten.index_put(x, [rows[:1] * 0, None, rows], torch.zeros(())), "index_put"),
    ],
)
def test_forms_that_are_not_covered_are_named(combine: Callable[..., Tensor], operator: str) -> None:
    model = Scattering(combine).eval()
    model.fc = nn.LazyLinear(5)
    example = (torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0)),)
    model(*example)
    analysis = analyse(capture(model, example))
    assert list(analysis.unknown) == [operator]
    assert not analysis.groups


def test_a_graph_that_is_held_is_normalised_once_and_has_its_nodes() -> None:
    """What a layer makes of the edges alone, with a number of edges that is known from their values only, is one constant for all layers."""
    model = graph_nets.GraphNet(graph_nets.GraphConvolution(12, 16), graph_nets.GraphConvolution(16, 5)).eval()
    x = torch.randn(2, graph_nets.NODES, 12, generator=torch.Generator().manual_seed(0))
    graph = capture(model, x)
    assert graph.signature.inputs[0].shape == ("batch", graph_nets.NODES, 12)
    assert any("the model holds a graph" in note for note in graph.notes)
    edges = graph_nets.edges()
    proper = int((edges[0] != edges[1]).sum()) + graph_nets.NODES
    constants = {name: tuple(value.shape) for name, value in graph.module.named_buffers() if name.endswith("_constant")}
    assert sorted(constants.values()) == [(2, proper), (proper,)]
    adjacency = torch.zeros(graph_nets.NODES, graph_nets.NODES).index_put(tuple(edges), torch.ones(edges.shape[1]), accumulate=True)
    adjacency.fill_diagonal_(1)
    root = adjacency.sum(0) ** -0.5  # every edge is there in both directions but for the chords, whose targets alone count
    dense = root[:, None] * adjacency.T * root[None, :]
    with torch.no_grad():
        hidden = torch.relu(dense @ (x @ model.one.linear.weight.T) + model.one.bias)
        expected = dense @ (hidden @ model.two.linear.weight.T) + model.two.bias
        torch.testing.assert_close(graph.module(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_graphs_that_are_given_leave_their_sizes_free() -> None:
    model = graph_nets.GraphsApart().eval()
    example = (torch.randn(2, 9, 12), torch.randint(0, 9, (2, 24, 2)))
    graph = capture(model, example)
    assert [spec.shape for spec in graph.signature.inputs] == [("batch", "sequence", 12), ("batch", "sequence_2", 2)]


def test_positions_are_no_graph() -> None:
    """Indices that come from sizes alone are as long as the sequence is."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x).index_add(1, torch.arange(x.size(1)).flip(0), x) @ self.linear.weight.T

    graph = capture(Placed(), torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0)))
    assert graph.signature.inputs[0].shape == ("batch", "sequence", 12)


def test_each_of_several_results_is_a_constant() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 5)
            self.register_buffer("edges", graph_nets.edges())

        def forward(self, x: Tensor) -> Tensor:
            source, target = self.edges
            target, order = target.sort(stable=True)
            sent = x.index_select(1, source[order]) / (1 + target.view(-1, 1))
            return self.linear(graph_nets.scatter_sum(sent, target, graph_nets.NODES))

    model, x = Sorted(), torch.randn(2, graph_nets.NODES, 12, generator=torch.Generator().manual_seed(0))
    graph = capture(model, x)
    assert not graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.sort.stable)
    assert close(graph.module(x), (model(x),))


def test_statistics_that_training_changes_and_parameters_are_no_constants() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(12), nn.Linear(12, 5)
            self.scale = nn.Parameter(torch.ones(12))
            self.register_buffer("edges", graph_nets.edges())

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2) * self.scale.exp() / (self.norm.running_var + 1)
            source, target = self.edges
            return self.linear(graph_nets.scatter_sum(x.index_select(1, source), target, graph_nets.NODES))

    graph = capture(Normed().eval(), torch.randn(2, graph_nets.NODES, 12, generator=torch.Generator().manual_seed(0)))
    assert not any(name.endswith("_constant") for name, _ in graph.module.named_buffers())


@pytest.mark.runtime("openvino")
@pytest.mark.parametrize("name", ["gcn_edges", "sage_mean", "sage_max", "gat", "graphs_apart"])
@torch.no_grad()
def test_openvino_computes_what_the_module_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, example = families.build(name)
    graph = capture(model, example)
    runtime = get_runtime("openvino")
    session = runtime.open(runtime.export(graph, tmp_path), graph.signature, Target("openvino"))
    for batch in (1, 3):
        inputs = graph.signature.flatten(nets.resized(example, batch))
        assert close(tuple(session.run([tensor.numpy() for tensor in inputs])), graph.module(*inputs))
    session.close()


class Geometric(nn.Module):
    """Two layers of PyTorch Geometric over a graph that the net holds."""

    def __init__(self, one: nn.Module, two: nn.Module, is_union: bool) -> None:
        super().__init__()
        self.one, self.two, self.is_union = one, two, is_union
        self.register_buffer("edges", graph_nets.edges(40))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_union:
            return self.two(torch.relu(self.one(x, self.edges)), self.edges)
        graphs, nodes = x.size(0), x.size(1)  # layers that take one graph only: the samples are put together as one
        edges = (self.edges.unsqueeze(1) + nodes * torch.arange(graphs).view(1, -1, 1)).flatten(1)
        return self.two(torch.relu(self.one(x.flatten(0, 1), edges)), edges).unflatten(0, (graphs, nodes))


def geometric(kind: str) -> tuple[nn.Module, dict[str, int]]:
    """The net as its user writes it, and its groups."""
    layers = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)

    def mlp(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 20), nn.ReLU(), nn.Linear(20, outputs))

    nets_and_groups: dict[str, Callable[[], tuple[nn.Module, nn.Module, bool, dict[str, int]]]] = {
        "gcn": lambda: (layers.GCNConv(30, 16), layers.GCNConv(16, 5), False, {"one.lin": 16}),
        "gcn_cached": lambda: (layers.GCNConv(30, 16, cached=True), layers.GCNConv(16, 5, cached=True), False, {"one.lin": 16}),
        "sage": lambda: (layers.SAGEConv(30, 16), layers.SAGEConv(16, 5), False, {"one.lin_l": 16}),
        "sage_max": lambda: (layers.SAGEConv(30, 16, aggr="max"), layers.SAGEConv(16, 5, aggr="max"), False, {"one.lin_l": 16}),
        "gin": lambda: (layers.GINConv(mlp(30, 16)), layers.GINConv(mlp(16, 5)), False, {"one.nn.0": 20, "one.nn.2": 16, "two.nn.0": 20}),
        "gat": lambda: (
            layers.GATConv(30, 6, heads=4),
            layers.GATConv(24, 5),
            True,
            {"one.lin": 4, "one.lin.size": 6},
        ),  # heads, and places in them
        "gat_2": lambda: (layers.GATv2Conv(30, 6, heads=4), layers.GATv2Conv(24, 5), True, {"one.lin_l": 4, "one.lin_l.size": 6}),
        "transformer": lambda: (
            *(layers.TransformerConv(30, 6, heads=4), layers.TransformerConv(24, 5), True),
            {"one.lin_query": 4, "one.lin_query.size": 6, "one.lin_value.size": 6, "two.lin_query": 5},
        ),
    }
    one, two, is_union, groups = nets_and_groups[kind]()
    return Geometric(one, two, is_union).eval(), groups


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gcn", "gcn_cached", "sage", "sage_max", "gin", "gat", "gat_2", "transformer"])
@torch.no_grad()
def test_layers_of_pytorch_geometric(kind: str, tmp_path: Path) -> None:
    model, groups = geometric(kind)
    example = (torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0)),)
    graph = capture(model, example)
    analysis = analyse(graph)
    assert {group.name: group.units for group in analysis.groups.values()} == groups
    assert not analysis.unknown
    removed = {name: list(range(0, units, 3)) for name, units in groups.items()}
    pruned = prune(graph, analysis, removed).graph
    to_onnx(pruned, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (x,) = nets.resized(example, batch)
        assert close(graph.module(x), (model(x),))
        assert close(pruned.module(x), masked_reference(graph, analysis, removed, [x]))
        assert close(tuple(session.run(None, {"x": np.asarray(x)})), pruned.module(x))

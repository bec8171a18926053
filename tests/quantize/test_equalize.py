"""Equalization before rounding: exact in float, worth it where it is done, and the same in the runtimes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from quantizing import AVX2, VNNI, calibration, captured, declares, everything, outputs, quantized
from torch import Tensor, nn

import nets
from planish.data import Split
from planish.distill.hints import shared_hints
from planish.errors import UnknownName
from planish.graph.divergence import divergence
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Analysis, Graph
from planish.graph.modes import set_mode, short_name
from planish.graph.replay import take
from planish.measure.machine import facts
from planish.quantize.arithmetic import quantizer_from_range, sqnr_db
from planish.quantize.equalize.channels import input_ranges, output_ranges
from planish.quantize.equalize.cross_layer import equalize_layers
from planish.quantize.equalize.search import Reader, Sample, full_range, search
from planish.quantize.equalize.smooth import readers_by_activation, smooth
from planish.quantize.options import precision_options
from planish.runtimes.contract import get_runtime
from planish.target import Target

OUTLIER = 60.0


class PreNorm(nn.Module):
    """x + f(norm(x)), as newer Transformers have it: only f reads the norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class PostNorm(nn.Module):
    """norm(x) + f(norm(x)), as BERT has it: the residual addition reads the norm as well."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.out(torch.tanh(self.query(x)) * torch.sigmoid(self.key(x)))


def planted(net: nn.Module, channel: int = 5) -> tuple[Graph, Analysis]:
    """A captured net, one channel of whose norm is an outlier that its readers hardly weigh."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    with torch.no_grad():
        net.norm.weight[channel] = OUTLIER  # type: ignore[index, operator, union-attr]
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.weight[:, channel] /= OUTLIER
    return captured(net, (torch.randn(2, 6, 32),))


def scaled_reads(graph: Graph) -> int:
    """How many explicit multiplications were put in."""
    return sum(short_name(node) == "mul" and "_smoothing" in str(node.args[1]) for node in graph.module.graph.nodes)


def smoothed(graph: Graph, analysis: Analysis, split: Split) -> tuple[Graph, set[str]]:
    """A copy that is smoothed but not rounded, and the operators that were changed."""
    copied = graph.copy()
    nodes = [found.node for found in analysis.operators.values() if found.kind == "linear"]
    groups = readers_by_activation(copied.module, nodes, {"linear"})
    done = smooth(copied.module, groups, take(split, split.n), dict.fromkeys(nodes, 127))
    copied.module.recompile()
    return copied, {name for found in done if found.inverse is not None for name in found.readers}


def chain(activation: nn.Module) -> nn.Module:
    """Convolutions, one of them per channel, with batch norm and a pool between."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        activation,
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        copy.deepcopy(activation),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, groups=4),
        copy.deepcopy(activation),
        nn.Conv2d(12, 5, 1),
    )


@pytest.mark.parametrize(("activation", "pairs"), [(nn.ReLU(), 3), (nn.LeakyReLU(0.1), 3), (nn.ReLU6(), 0), (nn.GELU(), 0)])
def test_cross_layer_equalization_is_exact_and_leaves_both_weights_the_same_range(activation: nn.Module, pairs: int) -> None:
    torch.manual_seed(0)
    net = chain(activation)
    with torch.no_grad():
        net[1].weight.copy_(torch.logspace(-2, 2, 8))  # type: ignore[operator, union-attr]
        net[3].weight[2].zero_()  # type: ignore[index, operator, union-attr]
    graph, _ = captured(net, nets.images(4))
    folded = fold_batch_norm(graph)
    set_mode(folded, False)
    split = calibration(graph)
    before = outputs(folded, split)
    found = equalize_layers(folded.module)
    assert len(found) == pairs
    after = outputs(folded, split)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    nodes = {node.name: node for node in folded.module.graph.nodes}
    for first, second in found:
        left, right = output_ranges(folded.module, nodes[first]), input_ranges(folded.module, nodes[second])
        used = (left > 0) & (right > 0)
        assert 7 <= int(used.sum()) <= 12
        torch.testing.assert_close(left[used], right[used], rtol=5e-3, atol=0)


def test_cross_layer_factors_are_the_square_root_of_the_ranges() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[8.0, -1.0], [0.5, 0.25]]))  # type: ignore[operator, union-attr]
        net[0].bias.copy_(torch.tensor([4.0, 1.0]))  # type: ignore[operator, union-attr]
        net[2].weight.copy_(torch.tensor([[0.5, 2.0]]))  # type: ignore[operator, union-attr]
    graph, _ = captured(net, (torch.randn(2, 2),))
    assert len(equalize_layers(graph.module)) == 1
    state = graph.module.state_dict()  # factors: sqrt(8 / 0.5) = 4 and sqrt(0.5 / 2) = 0.5
    assert torch.equal(state["0.weight"], torch.tensor([[2.0, -0.25], [1.0, 0.5]]))
    assert torch.equal(state["0.bias"], torch.tensor([1.0, 2.0])) and torch.equal(state["2.weight"], torch.tensor([[2.0, 1.0]]))


def test_a_channel_that_others_read_is_not_shared_out() -> None:
    """In a residual net only the convolutions inside each block are pairs."""
    graph, analysis = captured(*nets.resnet(1, "A"))
    found = equalize_layers(fold_batch_norm(graph).module)
    names = {operator.node: name for name, operator in analysis.operators.items()}
    assert [(names[first], names[second]) for first, second in found] == [(f"layer{i}.0.conv1", f"layer{i}.0.conv2") for i in (1, 2, 3)]


def test_cross_layer_equalization_cures_activations_of_unequal_size() -> None:
    """A channel of 100 times the others' size, which the next convolution weighs by a hundredth, spends the grid of its activation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        net[0].weight[0] *= 100  # type: ignore[index, operator, union-attr]
        net[2].weight[:, 0] /= 100  # type: ignore[index, operator, union-attr]
    graph, analysis = captured(net, nets.images(4))
    split = calibration(graph)
    plain, equal = (quantized(graph, analysis, split=split, observer="minmax", equalization=how) for how in ("none", "cross-layer"))
    gained = sqnr_db(outputs(graph, split), outputs(equal.graph, split)) - sqnr_db(outputs(graph, split), outputs(plain.graph, split))
    assert gained > 20.0  # 40 dB of the activation's rounding, until that of the inputs and weights is left


@pytest.mark.parametrize(("net", "multiplications"), [(PreNorm, 0), (PostNorm, 1)])
def test_smoothing_is_exact_and_is_folded_where_nobody_else_reads(net: type[nn.Module], multiplications: int) -> None:
    graph, analysis = planted(net())
    split = calibration(graph, samples=64)
    found, changed = smoothed(graph, analysis, split)
    norm_readers = {"linear"} if multiplications == 0 else {"linear", "linear_1"}  # both readers of one norm, by one multiplication
    assert norm_readers <= changed
    assert scaled_reads(found) == multiplications
    before = outputs(graph, split)
    torch.testing.assert_close(outputs(found, split), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def test_a_linear_map_takes_the_division_through_its_rectifier() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        net[0].weight[3] *= OUTLIER  # type: ignore[index, operator, union-attr]
        net[2].weight[:, 3] /= OUTLIER  # type: ignore[index, operator, union-attr]
    graph, analysis = captured(net, (torch.randn(2, 16),))
    split = calibration(graph, samples=64)
    found, changed = smoothed(graph, analysis, split)
    assert changed == {"linear_1"} and scaled_reads(found) == 0
    torch.testing.assert_close(outputs(found, split), outputs(graph, split), rtol=1e-5, atol=1e-5)
    assert float(found.module.state_dict()["0.weight"][3].abs().max()) < float(graph.module.state_dict()["0.weight"][3].abs().max()) / 10


@pytest.mark.parametrize("net", [PreNorm, PostNorm])
def test_a_planted_outlier_is_cured(net: type[nn.Module]) -> None:
    """The step of the activation falls by about the outlier's factor, 60: its noise by 35 dB, until other rounding is what is left."""
    graph, analysis = planted(net())
    split = calibration(graph, samples=64)
    original = outputs(graph, split)
    plain = quantized(graph, analysis, declares("linear"), split=split, equalization="none")
    done = quantized(graph, analysis, declares("linear"), split=split)
    assert done.operators == plain.operators
    # of the part that is computed: what the residual connection carries is not rounded
    gained = sqnr_db(original, outputs(done.graph, split)) - sqnr_db(original, outputs(plain.graph, split))
    assert gained > 15.0


def test_nothing_changes_where_nothing_pays() -> None:
    torch.manual_seed(0)
    graph, analysis = captured(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)), (torch.randn(2, 32),))
    split = calibration(graph, samples=64)
    plain, done = (quantized(graph, analysis, split=split, equalization=how) for how in ("none", "smooth"))
    assert str(plain.graph.module.graph) == str(done.graph.module.graph)
    one, other = plain.graph.module.state_dict(), done.graph.module.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_smoothed_values_are_no_hints() -> None:
    """A student that reads a value in another scale cannot follow the teacher's."""
    graph, analysis = planted(PreNorm())
    split = calibration(graph, samples=64)
    plain, done = (quantized(graph, analysis, split=split, equalization=how) for how in ("none", "smooth"))
    sample = [tensor[:1] for tensor in graph.example]
    assert {hint.reader for hint in shared_hints(graph, plain.graph, sample)} >= {"linear"}
    assert "linear" not in {hint.reader for hint in shared_hints(graph, done.graph, sample)}


def test_an_equalization_that_there_is_not_is_refused() -> None:
    graph, analysis = captured(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))
    with pytest.raises(UnknownName, match="smooth"):
        quantized(graph, analysis, equalization="smoothquant")


def test_a_weight_that_others_read_is_left_alone() -> None:
    net = PostNorm()
    net.key.weight = net.query.weight
    graph, analysis = planted(net)
    nodes = [found.node for found in analysis.operators.values() if found.kind == "linear"]
    assert readers_by_activation(graph.module, nodes, {"linear"}) == [["linear_2"]]
    assert readers_by_activation(graph.module, nodes, {"conv"}) == []


def test_what_matters_to_the_outputs_is_not_clipped() -> None:
    """A row of 60 times the others' size, in all channels: no factor per channel helps, and clipped it loses most of the outputs' energy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 64, generator=generator)
    rows[100] = 60.0 * rows[100].sign()
    reader = Reader(torch.randn(16, 64, generator=generator), 127)
    sample = Sample([rows], [torch.ones(512)], *torch.aminmax(rows, dim=0))
    assert search(sample, [reader]) is None
    whole = sample.whole()
    clipped = quantizer_from_range(whole.low / 4, whole.high / 4, whole.grid)
    assert full_range(sample, [reader], clipped) == whole
    assert full_range(sample, [reader], whole) is None
    assert full_range(sample, [reader], quantizer_from_range(whole.low / 1.05, whole.high / 1.05, whole.grid)) is None


def test_an_unclipped_activation_has_its_whole_range_in_the_program() -> None:
    graph, analysis = captured(nn.Sequential(nn.Linear(64, 16)), (torch.randn(2, 64),))
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    rows[100] = 60.0 * rows[100].sign()
    split = Split([rows.numpy()], None, 512)
    done = quantized(graph, analysis, split=split, samples=512, observer="moving-average", precisions={"0": "int8"})
    plain = quantized(graph, analysis, split=split, samples=512, observer="moving-average", precisions={"0": "int8"}, equalization="none")
    (scale,) = (value for name, value in done.graph.module.state_dict().items() if name.endswith("_scale") and value.dim() == 0)
    covered = float(scale) * 255
    assert covered == pytest.approx(float(rows.max() - rows.min()), rel=1e-3)
    original = outputs(graph, split)
    assert sqnr_db(original, outputs(done.graph, split)) > sqnr_db(original, outputs(plain.graph, split)) + 3.0


def test_even_or_broken_activations_are_left_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(512, 64, generator=generator)
    reader = Reader(torch.randn(16, 64, generator=generator), 127)
    low, high = torch.aminmax(even, dim=0)
    for top, weight in ((high, reader.weight), (torch.full_like(high, float("inf")), reader.weight), (high, torch.zeros(16, 64))):
        sample = Sample([even], [torch.ones(512)], low, top)
        assert search(sample, [Reader(weight, 127)]) is None


@pytest.mark.parametrize("equalization", ["smooth", "cross-layer"])
def test_options_know_what_equalization_saves(equalization: str) -> None:
    graph, analysis = planted(PostNorm())
    split = calibration(graph, samples=64)
    runtime = declares("linear")
    options = precision_options(graph, analysis, runtime, AVX2, split, equalization=equalization)  # type: ignore[arg-type]
    original = outputs(graph, split)
    assert len(options) == 3
    for option in options:
        alone = quantized(
            graph,
            analysis,
            runtime,
            AVX2,
            precisions={option.subject: "int8"},
            split=split,
            bias_correction=False,
            equalization=equalization,
        )
        expected = float(divergence([original]).per_sample([outputs(alone.graph, split)], [original]).double().mean())
        assert option.loss == pytest.approx(expected, rel=0.05, abs=1e-9)
    plain = {option.subject: option.loss for option in precision_options(graph, analysis, runtime, AVX2, split, equalization="none")}
    losses = {option.subject: option.loss for option in options}
    if equalization == "smooth":
        assert all(losses[name] < plain[name] / 5 for name in ("query", "key"))
    else:
        assert losses == pytest.approx(plain)  # no pair here


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
@pytest.mark.parametrize("net", [PreNorm, PostNorm])
def test_the_exported_form_computes_what_the_module_does_on_int8_kernels(net: type[nn.Module], runtime: str, tmp_path: Path) -> None:
    there = get_runtime(runtime, require=False)
    if there.missing():
        pytest.skip(f"{runtime} is not installed")
    graph, analysis = planted(net())
    split = calibration(graph, samples=64)
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, there, target, split=split, precisions=everything(analysis))
    assert scaled_reads(done.graph) >= (net is PostNorm)
    session = there.open(there.export(done.graph, tmp_path), graph.signature, target)
    test = calibration(graph, samples=3, seed=9)
    found = torch.from_numpy(session.run([np.ascontiguousarray(array) for array in test.inputs])[0])
    proof = session.proof()
    session.close()
    assert sqnr_db(outputs(done.graph, test), found) > 45.0
    assert proof.float_kernels == 0 and proof.int8_kernels == (2 if net is PreNorm else 3), proof


def test_bert_is_smoothed_as_one_activation_for_query_key_and_value() -> None:
    model, example = nets.bert(1)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[7] = OUTLIER  # type: ignore[union-attr, operator, index]
    graph, analysis = captured(model, example)
    names = [name for name in analysis.operators if name.rpartition(".")[2] in ("query", "key", "value")]
    done = quantized(graph, analysis, declares("linear"), VNNI, precisions=dict.fromkeys(names, "int8"))
    assert done.operators == tuple(names) and len(names) == 3
    assert scaled_reads(done.graph) == 1

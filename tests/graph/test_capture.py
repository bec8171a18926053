"""Capture: equals the model in eval at any batch, keeps names and ties, leaves the caller's things alone, and blames the right line."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import nets
from planish.errors import CaptureError, DataError, UsageError
from planish.graph.capture import capture
from planish.graph.interpret import observe
from planish.graph.modes import set_mode
from planish.graph.modules import as_module
from planish.signature import TensorSpec


def run(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of nested outputs, by an independent walk."""
    if isinstance(value, Tensor):
        return [value]
    if value is None:
        return []
    items = value.values() if hasattr(value, "keys") else value
    return [leaf for item in items for leaf in leaves(item)]


@pytest.mark.parametrize("name", nets.ZOO)
def test_graph_equals_model_at_batch_1_3_17_and_another_length(name: str) -> None:
    model, example = nets.ZOO[name]()
    graph = capture(model, example)
    for batch in (1, 3, 17):
        inputs = nets.resized(example, batch, 9 if name in nets.SEQUENCE else None)
        expected = leaves(run(model, inputs))
        with torch.no_grad():
            got = graph.module(*graph.signature.flatten(inputs))
        assert isinstance(got, tuple)
        for wanted, value in zip(expected, got, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("name", nets.ZOO)
def test_parameters_keep_names_values_and_ties(name: str) -> None:
    model, example = nets.ZOO[name]()
    graph = capture(model, example)
    mine = dict(graph.module.named_parameters(remove_duplicate=False))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(mine[key], value) and mine[key] is not value
    assert len({id(p) for p in mine.values()}) == len({id(p) for p in theirs.values()})


def test_tied_weights_stay_one_parameter() -> None:
    model, example = nets.bert_masked()
    graph = capture(model, example)
    mine = dict(graph.module.named_parameters(remove_duplicate=False))
    assert mine["bert.embeddings.word_embeddings.weight"] is mine["cls.predictions.decoder.weight"]
    again = dict(graph.copy().module.named_parameters(remove_duplicate=False))
    assert again["bert.embeddings.word_embeddings.weight"] is again["cls.predictions.decoder.weight"]


def test_caller_is_left_alone() -> None:
    model, example = nets.bert()
    model.train()
    model.bert.pooler.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    flags = (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype())
    capture(model, example)
    assert torch.equal(torch.rand(3), expected)
    assert flags == (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype())
    assert modes == [module.training for module in model.modules()]
    assert "forward" not in vars(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_signature_of_bert_and_of_nested_dictionaries() -> None:
    model, example = nets.bert()
    signature = capture(model, example).signature
    assert signature.inputs == (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "sequence")),
    )
    assert signature.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    assert (signature.takes, signature.gives) == ("dict", "dict")
    graph = capture(*nets.dict_output())
    assert [spec.name for spec in graph.signature.outputs] == ["logits", "features.hidden", "features.maps.0"]
    assert (graph.signature.takes, graph.signature.gives) == ("tensor", "dict")
    assert set(graph(nets.images(size=8)[0])) == {"logits", "features.hidden", "features.maps.0"}


def test_order_of_a_dict_is_the_callers() -> None:
    model, example = nets.bert()
    swapped = dict(reversed(example.items()))
    graph = capture(model, swapped)
    assert [spec.name for spec in graph.signature.inputs] == ["attention_mask", "input_ids"]
    torch.testing.assert_close(graph(swapped)["logits"], run(model, example)["logits"], rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """An unused input, an output that is an input, the same output twice, a name that is a keyword, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, lambda_: Tensor, idle: Tensor) -> list[Any]:
        y = self.fc(x)
        return [y, x, y, 3, lambda_.to(torch.float32)]


def test_unused_inputs_and_passed_through_outputs() -> None:
    example = (torch.randn(2, 4), torch.arange(2), torch.zeros(2, 3, dtype=torch.bool))
    graph = capture(Odd(), example)
    assert [spec.dtype for spec in graph.signature.inputs] == ["float32", "int64", "bool"]
    outputs = graph.module(*example)
    assert torch.equal(outputs[1], example[0]) and torch.equal(outputs[0], outputs[2])
    assert [spec.name for spec in graph.signature.outputs] == ["output_0", "output_1", "output_2", "output_4"]
    assert graph.notes == ["outputs that are no tensors are left out: 3"]
    assert isinstance(graph(example), tuple)


def test_named_tuple_gives_its_fields() -> None:
    Pair = namedtuple("Pair", "mean deviation")  # noqa: PYI024

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Pair(x.mean(1), x.std(1))

    graph = capture(Gives(), torch.randn(4, 5))
    assert graph.signature.gives == "dict"
    assert [spec.name for spec in graph.signature.outputs] == ["mean", "deviation"]


def test_example_batch_of_one_is_no_constant() -> None:
    model, example = nets.resnet()
    graph = capture(model, (example[0][:1],))
    assert graph.signature.inputs[0].shape == ("batch", 3, 16, 16)
    assert graph.example[0].shape[0] == 1
    assert graph.module(example[0])[0].shape == (2, 10)


def test_static_batch_is_said() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, 3, 2).mean(2)

    graph = capture(Fixed(), torch.randn(4, 6))
    assert graph.signature.inputs[0].shape[0] == 4
    assert any("batch is static" in note for note in graph.notes)


class Patches(nn.Module):
    """Pixels without a channel axis, in patches of 2 x 2, or of two rows; positions are for 16 patches, or for none."""

    def __init__(self, has_positions: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 16, 4)) if has_positions else None

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is None:
            return x.unflatten(1, (-1, 2)).mean(2)
        return x.reshape(x.shape[0], 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(x.shape[0], 16, 4) + self.positions


def test_an_axis_is_free_only_if_the_model_takes_another_size_there() -> None:
    fixed = capture(Patches(True), torch.randn(3, 8, 8))
    assert fixed.signature.inputs[0].shape == ("batch", 8, 8) and any("no other size than 8" in note for note in fixed.notes)
    free = capture(Patches(False), torch.randn(3, 8, 8))
    assert all(isinstance(size, str) for size in free.signature.inputs[0].shape), "any even number of rows is taken"


def test_static_sequence_is_said() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.fc = nn.Embedding(10, 4), nn.Linear(12 * 4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.fc(self.embedding(tokens).flatten(1))

    graph = capture(Fixed(), torch.zeros(2, 12, dtype=torch.long))
    assert graph.signature.inputs[0].shape == ("batch", 12)
    assert any("sequence axis of 'tokens' is static at 12" in note for note in graph.notes)


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_is_removed(old: bool) -> None:
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    with pytest.warns(FutureWarning) if old else contextlib.nullcontext():
        model = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    graph = capture(model, x)
    assert set(dict(graph.module.named_parameters())) == {"0.weight", "0.bias"}
    torch.testing.assert_close(graph(x), expected.detach(), rtol=1e-5, atol=1e-6)
    assert any("weight_g" in name or "original" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(x), expected)  # the caller's model still runs, and can be captured again
    torch.testing.assert_close(capture(model, x)(x), expected.detach(), rtol=1e-5, atol=1e-6)


def test_in_place_operators_become_functional() -> None:
    class Places(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu_(x * 2)
            y += x
            z = y.clone()
            z[:, 0] = 0.0
            return z.mul_(3)

    x = torch.randn(3, 4)
    graph = capture(Places(), x)
    names = [str(node.target) for node in graph.module.graph.nodes if node.op == "call_function"]
    assert "aten.relu.default" in names and "aten.add.Tensor" in names and "aten.relu_.default" not in names
    torch.testing.assert_close(graph(x), Places()(x.clone()))
    before = x.clone()
    graph(x)
    assert torch.equal(x, before)


def test_transformer_layer_is_not_one_opaque_operator() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    graph = capture(model, x)
    assert not any("transformer_encoder" in str(node.target) for node in graph.module.graph.nodes)
    torch.testing.assert_close(graph(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_state_pairs() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.fc = nn.GRUCell(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, h: Tensor) -> dict[str, Tensor]:
            h = self.cell(x, h)
            return {"y": self.fc(h), "h_next": h}

    torch.manual_seed(0)
    model, inputs = Cell(), {"x": torch.randn(2, 4), "h": torch.randn(2, 8)}
    graph = capture(model, inputs, state={"h": "h_next"})
    assert graph.signature.state == {"h": "h_next"}
    torch.testing.assert_close(graph(inputs)["h_next"], model(**inputs)["h_next"], rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match=r"state must map inputs \['h', 'x'\] to outputs \['h_next', 'y'\]; got 'h': 'hidden'"):
        capture(model, inputs, state={"h": "hidden"})
    with pytest.raises(UsageError, match="state 'h' must have the shape and dtype of 'y'"):
        capture(model, inputs, state={"h": "y"})


def line_of(function: Any, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, line in enumerate(lines) if text in line)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.abs().max().item())
        return torch.stack([x] * count).sum(0)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1][0]


@pytest.mark.parametrize(
    ("model", "inputs", "text", "remedy"),
    [
        (Branches(), (torch.randn(2, 3),), "if x.sum() > 0", "torch.where"),
        (Counts(), (torch.full((2, 3), 2.0),), "x.abs().max().item()", "move it out of forward"),
        (Packs(), (torch.randn(2, 6, 4), torch.tensor([6, 3])), "pack_padded_sequence(", "mask them"),
    ],
    ids=["branch", "item", "packed"],
)
def test_what_cannot_be_traced_names_the_line(model: nn.Module, inputs: Any, text: str, remedy: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs)
    message = str(caught.value)
    assert f"{__file__}:{line_of(type(model), text)}" in message
    assert remedy in message and "\n" not in message


def test_a_model_that_fails_on_its_example_names_the_line() -> None:
    model, _ = nets.resnet()
    with pytest.raises(CaptureError, match=r"must run on its example_inputs; .*nets\.py:\d+ \(`.*conv1.*`\) raised RuntimeError"):
        capture(model, torch.randn(2, 4, 16, 16))


@pytest.mark.parametrize(
    ("model", "inputs", "kind", "message"),
    [
        (torch.relu, (torch.ones(1),), UsageError, "must be a torch.nn.Module; got builtin_function_or_method"),
        (nn.Linear(2, 2), "images", UsageError, "must be a tensor, a tuple or a dict of tensors; got str"),
        (nn.Linear(2, 2), (), UsageError, "at least one tensor"),
        (nn.Linear(2, 2), ([1, 2],), UsageError, "'input' is list"),
        (nn.Bilinear(2, 2, 2), (torch.ones(2, 2), torch.ones(3, 2)), DataError, "axis 0 of every example input must be the batch"),
        (nn.Linear(2, 2), torch.tensor(1.0), DataError, "axis 0"),
        (nn.Linear(2, 2), torch.ones(0, 2), DataError, "at least 1"),
    ],
)
def test_misuse(model: Any, inputs: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        capture(model, inputs)


def test_observe_shows_arguments_and_results() -> None:
    model, example = nets.resnet()
    graph = capture(model, example)
    names = [node.name for node in graph.module.graph.nodes if "conv2d" in str(node.target)]
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    with torch.no_grad():
        outputs = observe(graph, example, names[:2], lambda name, args, out: seen.update({name: (args[0].shape, out.shape)}))
    assert seen == {names[0]: ((2, 3, 16, 16), (2, 8, 16, 16)), names[1]: ((2, 8, 16, 16), (2, 8, 16, 16))}
    torch.testing.assert_close(outputs[0], run(model, example), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="no node named 'conv'"):
        observe(graph, example, ["conv"], lambda *_: None)


def test_as_module_takes_and_gives_what_the_model_did() -> None:
    model, example = nets.bert()
    graph = capture(model, example)
    module = as_module(graph)
    assert module.state_dict().keys() <= model.state_dict().keys() | {"bert.embeddings.token_type_ids", "bert.embeddings.position_ids"}
    expected = run(model, example)["logits"]
    torch.testing.assert_close(module(**example)["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        module(example["input_ids"], attention_mask=example["attention_mask"])["logits"], expected, rtol=1e-5, atol=1e-5
    )
    module.train()
    assert graph.module.training and not torch.allclose(module(**example)["logits"], expected)
    module.eval()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(**example)["logits"].abs().max() == 0
    torch.testing.assert_close(module(**example)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_graph_copies_train_alone() -> None:
    graph = capture(*nets.resnet())
    twin = graph.copy()
    set_mode(twin, training=True)
    twin(twin.example[0])
    assert not graph.module.training and twin.module.training
    mine, its = dict(graph.module.named_buffers()), dict(twin.module.named_buffers())
    assert not torch.equal(mine["bn1.running_mean"], its["bn1.running_mean"])


def test_a_single_sample_without_a_batch_axis_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    with pytest.raises(CaptureError, match=r"takes these inputs with a batch axis in front: give images\[:1\], not images\[0\]"):
        capture(net, (torch.zeros(3, 8, 8),))


class Sampling(nn.Module):
    """A variational autoencoder that samples whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 6), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encode(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decode(code)


def test_what_draws_random_numbers_in_eval_mode_is_named() -> None:
    lines, first = inspect.getsourcelines(Sampling)
    number = first + next(i for i, line in enumerate(lines) if "randn_like" in line)
    wanted = rf"test_capture\.py:{number}: randn_like draws random numbers; use their mean unless self\.training, or make them an input"
    with pytest.raises(CaptureError, match=wanted):
        capture(Sampling().eval(), (torch.zeros(2, 8),))


@pytest.mark.parametrize("name", ["code", "graph"])
def test_a_layer_named_like_a_property_of_graph_modules_is_named(name: str) -> None:
    net = nn.Sequential()
    net.add_module(name, nn.Linear(8, 2))
    with pytest.raises(CaptureError, match=f"has a layer named '{name}', which is a property of torch.fx's own modules; rename it"):
        capture(net, (torch.zeros(2, 8),))

"""Workloads: every form of a split gives the same arrays, bad ones are named, and the fingerprint tells what differs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from planish.errors import DataError, UnknownName, UsageError
from planish.workload import Workload

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(23, 3, generator=GENERATOR)
Y = torch.arange(23) % 4
EXAMPLE = (X[:2],)


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(x, int(y)) for x, y in zip(X, Y, strict=True)])


def job(**changes: Any) -> Workload:
    return Workload(**{"model": nn.Linear(3, 4), "example_inputs": EXAMPLE, **changes})


BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]
FORMS = {
    "list": lambda: BATCHES,
    "tuple of batches": lambda: tuple(BATCHES),
    "one batch": lambda: (X, Y),
    "generator": lambda: iter(BATCHES),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "subset": lambda: Subset(Subset(TensorDataset(X.flip(0), Y.flip(0)), list(range(23))), list(range(22, -1, -1))),
    "map-style": lambda: Items([(x, int(y)) for x, y in zip(X, Y, strict=True)]),
    "map-style, nested inputs": lambda: Items([((x,), y) for x, y in zip(X, Y, strict=True)]),
    "map-style, lists of numbers": lambda: Items([(np.asarray(x), y.item()) for x, y in zip(X, Y, strict=True)]),
    "iterable dataset": Stream,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
    "loader without batches": lambda: DataLoader(TensorDataset(X, Y), batch_size=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_split_gives_the_same_arrays(form: str, tmp_path: Path) -> None:
    data = job(test=FORMS[form]()).materialize(tmp_path)
    assert data.test is not None and data.test.n == 23
    np.testing.assert_array_equal(data.test.inputs[0], X.numpy())
    np.testing.assert_array_equal(data.test.targets, Y.numpy())
    assert data.judged == ("test", data.test)


def test_files_are_plain_npy_and_never_change(tmp_path: Path) -> None:
    data = job(test=BATCHES).materialize(tmp_path)
    assert data.test is not None
    data.test.inputs[0][:] = 7.0
    np.testing.assert_array_equal(np.load(tmp_path / "test.input0.npy", mmap_mode="r"), X.numpy())
    assert not list(tmp_path.glob("*.part"))


def test_batches_follow_an_order_and_cover_everything(tmp_path: Path) -> None:
    split = job(test=BATCHES).materialize(tmp_path).test
    assert split is not None
    plain = list(split.batches(10))
    assert [len(targets) for _, targets in plain if targets is not None] == [10, 10, 3]
    order = np.array([5, 1, 22])
    ((inputs, targets),) = split.batches(10, order)
    np.testing.assert_array_equal(inputs[0], X.numpy()[order])
    np.testing.assert_array_equal(targets, Y.numpy()[order])


A, B = torch.randn(6, 3, generator=GENERATOR), torch.arange(24).reshape(6, 4)


@pytest.mark.parametrize(
    ("example", "item"),
    [
        ((A, B), ((A, B), Y[:6])),
        ((A, B), (A, B, Y[:6])),
        ({"a": A, "b": B}, ({"b": B, "a": A}, Y[:6])),
    ],
)
def test_several_inputs(example: Any, item: Any, tmp_path: Path) -> None:
    data = job(example_inputs=example, test=[item]).materialize(tmp_path)
    assert data.test is not None
    np.testing.assert_array_equal(data.test.inputs[0], A.numpy())
    np.testing.assert_array_equal(data.test.inputs[1], B.numpy())
    np.testing.assert_array_equal(data.test.targets, Y[:6].numpy())


@pytest.mark.parametrize(
    ("example", "bare"),
    [((A,), A), ((A,), (A,)), ({"a": A, "b": B}, {"a": A, "b": B}), ((A, A, B), (A, A, B)), ({"a": A}, ({"a": A}, None))],
)
def test_inputs_without_a_target(example: Any, bare: Any, tmp_path: Path) -> None:
    data = job(example_inputs=example, metric="agreement", test=[bare]).materialize(tmp_path)
    assert data.test is not None and data.test.targets is None and data.test.n == 6


def test_calibration_takes_inputs_only_and_drops_targets(tmp_path: Path) -> None:
    data = job(example_inputs=(A, B), calibration=[(A, B)]).materialize(tmp_path)
    assert data.calibration.n == 6 and data.calibration.targets is None
    data = job(calibration=DataLoader(TensorDataset(X, Y), batch_size=4)).materialize(tmp_path)
    assert data.calibration.n == 23 and data.calibration.targets is None


nan = X.clone()
nan[9, 1] = float("nan")
inf = X.clone()
inf[1, 1] = float("inf")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty list": ({"train": []}, "train: must hold at least one sample"),
    "empty dataset": ({"test": TensorDataset(X[:0], Y[:0])}, "test: must hold at least one sample"),
    "ragged batches": ({"test": [(X, Y), (torch.zeros(2, 5), Y[:2])]}, r"test: batch 1, input '0': samples must have one shape; got \[5\]"),
    "ragged samples": ({"test": Items([(X[0], 1), (X[0, :2], 1)])}, r"test: sample 1, input '0'.*got \[2\] after \[3\]"),
    "ragged targets": ({"test": [(X, Y), (X, torch.stack([Y, Y], 1))]}, r"test: batch 1, target: .*got \[2\]"),
    "dtype": ({"test": [(X.long(), Y)]}, "test: batch 0, input '0': must be float32 like the example; got int64"),
    "double example": ({"example_inputs": (X.long(),), "test": [(X, Y)]}, "batch 0, input '0': must be int64"),
    "sample axis missing": ({"test": [(X[0], 1)]}, "batch 0, input '0': a batch must have 2 axes.*need a sample axis"),
    "items with batch axis": ({"test": Items([(X[:1], 1)])}, "test: sample.*items of a Dataset are single samples"),
    "nan": ({"test": [(X[:2], Y[:2]), (nan, Y)]}, "test: batch 1, input '0': must be finite; sample 9 of this batch holds NaN"),
    "inf": ({"test": TensorDataset(inf, Y)}, "test: samples 0 to 22, input '0': must be finite; sample 1 .*infinity"),
    "nan in calibration": (
        {"calibration": [X, nan], "test": [(X, Y)]},
        "calibration: batch 1, input '0': must be finite; sample 9 .* holds NaN",
    ),
    "inf in calibration": ({"calibration": inf, "test": [(X, Y)]}, "calibration: batch 0, input '0': must be finite; sample 1 .*infinity"),
    "nan target": ({"metric": "rmse", "test": [(X, nan[:, 1])]}, "test: batch 0, target: must be finite"),
    "target count": ({"test": [(X, Y[:5])]}, r"test: batch 0, target: must have one entry per sample \(23\)"),
    "target sometimes": ({"test": [(X, Y), (X, None)]}, "test: batch 1, target: either every batch"),
    "target sometimes, samples": ({"test": Items([(X[0], 1), (X[0], None)])}, "test: sample 1, target: either every sample"),
    "no labels": ({"test": [X]}, "test: the metric 'accuracy' needs labels"),
    "negative labels": ({"test": [(X, Y - 1)]}, "test: labels must be at least 0.*sample 0 has -1"),
    "text labels": ({"test": Items([(X[0], "cat")])}, "test: sample 0, target: must be a tensor, an array or a number; got str"),
    "two bare tensors": ({"example_inputs": (A, B), "test": [(A, B)]}, r"test: batch 0: two bare tensors could be \(inputs, target\)"),
    "missing key": (
        {"example_inputs": {"a": A, "b": B}, "test": [({"a": A}, Y[:6])]},
        r"batch 0: inputs must have the keys.*missing \['b'\]",
    ),
    "unknown key": ({"example_inputs": {"a": A}, "test": [({"a": A, "c": A}, None)]}, r"unknown \['c'\]"),
    "dict for a tuple": ({"test": [{"a": X}]}, "example_inputs is a tuple"),
    "tuple for a dict": ({"example_inputs": {"a": A}, "test": [(A, Y[:6])]}, "example_inputs is a dict"),
    "too many inputs": ({"test": [(X, Y, Y, Y)]}, r"batch 0: must be \(inputs, target\) with 1 input; got a tuple"),
    "inputs disagree": ({"example_inputs": (A, B), "test": [((A, B[:3]), Y[:6])]}, "every input must have the same number of samples"),
    "no split": ({"test": 3.5}, "test: batch 0"),
    "text": ({"test": "data.csv"}, "test: must be a Dataset, a DataLoader or a list of batches"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    with pytest.raises(DataError, match=message):
        job(**changes).materialize(tmp_path)
    assert not list(tmp_path.glob("*.part"))


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": 3}, UsageError, "model: must be an nn.Module"),
    "metric name": ({"metric": "acuracy"}, UnknownName, "did you mean 'accuracy'"),
    "metric kind": ({"metric": 3}, UsageError, "metric: must be a name"),
    "direction": ({"higher_is_better": False}, UsageError, "'accuracy' is better when higher"),
    "loss": ({"loss": "mse"}, UsageError, "loss: must be a function"),
    "state": ({"state": {"h": 3}}, UsageError, "state: must map"),
    "slash": ({"name": "../net"}, UsageError, "name: must be"),
    "nul": ({"name": "a\0b"}, UsageError, "name: must be"),
    "no inputs": ({"example_inputs": ()}, DataError, "it is empty"),
    "nested inputs": ({"example_inputs": ((X, X),)}, DataError, "'0' is a tuple"),
    "scalar input": ({"example_inputs": (torch.tensor(1.0),)}, DataError, "every size must be at least 1"),
    "uneven inputs": ({"example_inputs": (X, A)}, DataError, "same number of samples on axis 0"),
    "infinite example": ({"example_inputs": (inf,)}, DataError, "must be finite"),
    "bfloat16": ({"example_inputs": (X.bfloat16(),)}, DataError, "bfloat16"),
    "inputs of text": ({"example_inputs": "abc"}, DataError, "must be a tuple or a dict of tensors"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_are_named(case: str) -> None:
    changes, kind, message = ARGUMENTS[case]
    with pytest.raises(kind, match=message):
        job(**changes)


def test_doubles_are_cast_with_a_note(tmp_path: Path) -> None:
    data = job(test=[(X.double().numpy(), Y)]).materialize(tmp_path)
    assert data.test is not None and data.test.inputs[0].dtype == np.float32
    assert any("cast from float64 to float32" in note for note in data.notes)


def test_one_sample_and_one_class_work_with_a_note(tmp_path: Path) -> None:
    data = job(test=[(X[:1], Y[:1])], train=[(X[:1], Y[:1])]).materialize(tmp_path)
    assert data.validation is None and data.train is not None and data.train.n == 1
    assert any("single sample" in note for note in data.notes)
    data = job(test=[(X, Y * 0)]).materialize(tmp_path)
    assert any("every label is 0" in note for note in data.notes)


def test_validation_is_held_out_from_the_end_of_train(tmp_path: Path) -> None:
    x, y = X.repeat(10, 1), Y.repeat(10)
    data = job(train=(x, y)).materialize(tmp_path)
    assert data.train is not None and data.validation is not None
    assert (data.train.n, data.validation.n) == (207, 23)
    np.testing.assert_array_equal(data.validation.inputs[0], x[207:].numpy())
    assert any("last 23 samples of train were held out" in note for note in data.notes)
    assert data.judged[0] == "validation" and data.calibration.n == 207


def test_data_stored_class_by_class_is_spread_evenly(tmp_path: Path) -> None:
    order = Y.repeat(100).argsort(stable=True)
    data = job(train=(X.repeat(100, 1)[order], Y.repeat(100)[order])).materialize(tmp_path)
    assert data.train is not None and data.validation is not None
    assert set(np.asarray(data.validation.targets)) == {0, 1, 2, 3} and data.train.n + data.validation.n == 2300
    assert data.calibration.n == 512
    np.testing.assert_array_equal(data.calibration.inputs[0][-1], data.train.inputs[0][-1])


def test_without_data_calibration_is_the_example(tmp_path: Path) -> None:
    data = job().materialize(tmp_path)
    assert data.judged == ("", None) and data.calibration.n == 2
    assert any("example inputs alone" in note for note in data.notes)


def test_a_shuffling_loader_is_settled_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    workload = job(test=DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = workload.materialize(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = workload.materialize(tmp_path / "b")
    assert first.test is not None and second.test is not None
    np.testing.assert_array_equal(first.test.inputs[0], second.test.inputs[0])
    assert first.digest == second.digest and not np.array_equal(first.test.inputs[0], X.numpy())


@pytest.mark.parametrize("error", [FileNotFoundError("7.png"), EOFError("cut off"), ValueError("no image")])
def test_what_a_dataset_raises_is_told_as_a_fault_of_the_data(tmp_path: Path, error: Exception) -> None:
    class Broken:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, i: int) -> Any:
            if i == 7:
                raise error
            return X[i], 0

    job = Workload(model=nn.Linear(3, 2), example_inputs=(X[:2],), train=Broken(), metric="accuracy")
    with pytest.raises(DataError, match=f"train: sample 7: reading it failed: {type(error).__name__}: {error}"):
        job.materialize(tmp_path)


def test_a_generator_is_read_once_and_can_be_asked_for_again(tmp_path: Path) -> None:
    workload = job(test=(batch for batch in BATCHES))
    first, second = workload.materialize(tmp_path / "a"), workload.materialize(tmp_path / "b")
    assert second.test is not None and first.digest == second.digest
    np.testing.assert_array_equal(second.test.inputs[0], X.numpy())
    workload = job(train=(batch for batch in BATCHES))
    workload.materialize(tmp_path / "a")
    with pytest.raises(DataError, match="train: a generator can be read only once"):
        workload.materialize(tmp_path / "b")


def test_labels_are_checked_against_the_model_once_it_has_run(tmp_path: Path) -> None:
    workload = job(test=[(X, Y + 1)])
    data = workload.materialize(tmp_path)
    with pytest.raises(DataError, match=r"test: labels must be integers in \[0, 3\].*sample 3 has 4"):
        workload.check_targets(data, [np.zeros((1, 4), np.float32)])
    workload.check_targets(data, [np.zeros((1, 5), np.float32)])


def test_model_is_copied_and_a_function_is_called_once() -> None:
    calls = []

    def build() -> nn.Module:
        calls.append(1)
        return nn.Linear(3, 4)

    workload = job(model=build)
    a, b = workload.model_module(), workload.model_module()
    assert len(calls) == 1 and a is not b
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    net = nn.Linear(3, 4).train()
    copy = job(model=net).model_module()
    assert net.training and not copy.training
    with torch.no_grad():
        copy.weight.zero_()  # type: ignore[union-attr, operator]
    assert bool(net.weight.abs().sum() > 0)
    with pytest.raises(UsageError, match=r"must return an nn\.Module"):
        job(model=lambda: 3).model_module()
    net.weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match="'weight' holds NaN"):
        job(model=net).model_module()
    with pytest.raises(DataError, match="is float64"):
        job(example_inputs=(X.double(),)).model_module()


def one() -> Any:
    def f(o: Any, t: Any) -> float:
        return 1.0

    return f


def one_with_a_comment() -> Any:
    def f(o: Any, t: Any) -> float:
        # a comment does not count
        return 1.0

    return f


def two() -> Any:
    def f(o: Any, t: Any) -> float:
        return 2.0

    return f


def test_fingerprint_names_what_differs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, other = nn.Linear(3, 4), nn.Linear(3, 4)

    def parts(**changes: Any) -> dict[str, str]:
        workload = job(**{"model": net, "test": BATCHES, "metric": one(), **changes})
        return workload.fingerprint(workload.materialize(tmp_path))

    base = parts()
    assert parts() == base == parts(metric=one_with_a_comment(), test=BATCHES)

    def changed(**changes: Any) -> set[str]:
        now = parts(**changes)
        return {part for part in base if base[part] != now[part]}

    assert changed(model=other) == {"parameters"}
    assert changed(test=[(X + 1, Y)]) == {"data"}
    assert changed(test=[(X, Y * 0)]) == {"data"}
    assert changed(metric=two()) == {"functions"}
    assert changed(augment=torch.neg) == {"functions"}
    assert changed(version="2") == {"version"}


def test_a_closure_over_a_number_counts(tmp_path: Path) -> None:
    def scaled(factor: float) -> Any:
        def metric(outputs: Any, targets: Any) -> float:
            return factor

        return metric

    net = nn.Linear(3, 4)
    first, second, third = (job(model=net, metric=scaled(factor), test=BATCHES) for factor in (1.0, 2.0, 1.0))
    data = first.materialize(tmp_path)
    assert first.fingerprint(data) == third.fingerprint(data) != second.fingerprint(data)


def test_scores_take_the_models_structure() -> None:
    outputs = torch.eye(4)[Y]
    assert job().score(outputs, Y) == 1.0
    assert job(metric="agreement").score(outputs, outputs.flip(1)) == 0.0
    assert job(metric=lambda o, t: (o["a"][:, 0] == t).float().mean()).score({"a": outputs}, Y) == pytest.approx(
        float((outputs[:, 0] == Y).float().mean())
    )


def test_importing_a_workload_loads_no_torch() -> None:
    code = "import sys, planish.workload, planish.metrics, planish.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def f1(outputs: Any, targets: Any) -> float:
    """A user's own metric that bears the name of a built-in one: several labels to a sample."""
    return float(((outputs > 0) == (targets > 0)).float().mean())


def test_a_users_metric_is_not_checked_as_the_one_of_that_name(tmp_path: Path) -> None:
    workload = job(test=[(X, torch.randint(0, 2, (23, 4)))], metric=f1)
    data = workload.materialize(tmp_path)
    workload.check_targets(data, [np.zeros((1, 4), np.float32)])


class Doubled(TensorDataset):
    """A sample is not what the tensors hold."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return 2 * x, y


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, list(range(len(data))))])
def test_a_subclass_of_a_dataset_is_asked_for_its_samples(wrap: Any, tmp_path: Path) -> None:
    data = job(train=wrap(Doubled(X, Y)), validation=[(X, Y)]).materialize(tmp_path)
    assert data.train is not None
    np.testing.assert_array_equal(data.train.inputs[0], 2 * X.numpy())


@pytest.mark.parametrize("judged", ["validation", "test"])
def test_recovery_on_the_judged_inputs_is_said(judged: str, tmp_path: Path) -> None:
    notes = job(**{judged: [(X, Y)]}).materialize(tmp_path / "a").notes
    assert any(f"inputs of {judged}, on which the drop is judged" in note for note in notes)
    notes = job(train=[(X, Y)], **{judged: [(X, Y)]}).materialize(tmp_path / "b").notes
    assert not any("on which the drop is judged" in note for note in notes)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_with_the_old_weight_norm_is_copied() -> None:
    """Its weight is computed from two parameters before each call, and torch refuses to copy what was computed."""
    net = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(4, 3)), torch.nn.ReLU())
    x = torch.randn(5, 4)
    expected = net(x)
    job = Workload(model=net, example_inputs=(x,), name="normed")
    copied = job.model_module()
    torch.testing.assert_close(copied(x), expected)
    with torch.no_grad():
        copied[0].weight_g.mul_(2.0)
    torch.testing.assert_close(net(x), expected)

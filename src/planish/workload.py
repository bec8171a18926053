"""A workload: what must be accelerated - model, example inputs, splits, metric and loss - and its identity. Needs no torch to import."""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import inspect
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish import data as _data
from planish.data import Data, Fields, Split, SplitWriter
from planish.errors import DataError, UsageError
from planish.metrics import Metric, check_targets, function_metric, get_metric
from planish.signature import Signature

if TYPE_CHECKING:
    from torch import nn

EVALUATE = "evaluate"
"""Stands for the split where the job itself judges."""
_CALIBRATION = 512
_HELD_OUT = 5000


def deep_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose weights are computed from others when it runs (weight norm as it was before parametrizations).

    Tensors whose elements all are one number (the parameters of a model that is larger than memory) are shared: a copy would be as large as it looks.
    """
    from torch import Tensor

    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for parameter in module.parameters(recurse=False):
            if parameter.numel() > 1 and not any(parameter.stride()):
                memo[id(parameter)] = parameter
    return copy.deepcopy(model, memo)


class Workload:
    """What must be accelerated.

    Args:
        model: an `nn.Module`, or a function that builds it; never changed.
        example_inputs: a tuple of tensors or a dict of them; one batch. Its sizes behind the sample axis are what latency is measured at.
        train, validation, test: a Dataset (items are samples `(inputs, target)`), a DataLoader, a list or another iterable of batches
            `(inputs, target)`; each optional. `data.parse_item` states what an item may look like. Without validation the last tenth of
            train (at most 5000 samples) is held out.
        calibration: inputs only; by default the first 512 samples of train, or of validation.
        metric: "accuracy", "f1", "rmse", "mae", "spearman", "perplexity"; without labels "agreement" or "cosine"; or f(outputs, targets) ->
            float, which gets torch tensors, the outputs in the model's structure.
        higher_is_better: for a function.
        evaluate: f(predict) -> float, instead of metric; `predict` takes inputs and gives outputs in the model's structure.
        loss: f(outputs, targets) -> scalar tensor, added to distillation.
        augment: f(inputs) -> inputs, on training batches, in the structure of `example_inputs`.
        state: input name -> output name, for inputs that the caller feeds from the step before.
        name: names the output; no path separators.
        version: any string that changes when something changed that planish cannot see (a file that a function reads).

    Raises:
        UsageError: an argument of the wrong kind. DataError: unusable example inputs.
    """

    def __init__(
        self,
        *,
        model: Any,
        example_inputs: Any,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        calibration: Any = None,
        metric: str | Callable[[Any, Any], float] = "accuracy",
        higher_is_better: bool = True,
        evaluate: Callable[[Callable[[Any], Any]], float] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        state: Mapping[str, str] | None = None,
        name: str = "net",
        version: str = "",
    ) -> None:
        if not callable(model):
            raise UsageError(f"model: must be an nn.Module or a function that builds one; got {type(model).__name__}")
        for what, function in (("evaluate", evaluate), ("loss", loss), ("augment", augment)):
            if function is not None and not callable(function):
                raise UsageError(f"{what}: must be a function or None; got {type(function).__name__}")
        if not isinstance(metric, str) and not callable(metric):
            raise UsageError(f"metric: must be a name or f(outputs, targets) -> float; got {type(metric).__name__}")
        if isinstance(metric, str) and get_metric(metric).higher_is_better and not higher_is_better:
            raise UsageError(f"higher_is_better: {metric!r} is better when higher; the argument is for a metric function")
        if state is not None and not (
            isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, str) for k, v in state.items())
        ):
            raise UsageError(f"state: must map input names to output names, like {{'h': 'h_next'}}; got {str(state)[:80]}")
        for what, text in (("name", name), ("version", version)):
            if not isinstance(text, str):
                raise UsageError(f"{what}: must be a string; got {type(text).__name__}")
        if not name or len(name) > 100 or name.startswith(".") or not name.isprintable() or set(name) & set("/\\:"):
            raise UsageError(f"name: must be 1 to 100 printable characters without / \\ : and not begin with a dot; got {name[:60]!r}")
        self.model = model
        self.example_inputs: Any = _example(example_inputs)
        self.train, self.validation, self.test, self.calibration = train, validation, test, calibration
        self.metric, self.evaluate = metric, evaluate
        self.higher_is_better = get_metric(metric).higher_is_better if isinstance(metric, str) else bool(higher_is_better)
        self.loss, self.augment = loss, augment
        self.state = dict(state or {})
        self.name, self.version = name, version
        self._built: nn.Module | None = None
        self._data: Data | None = None

    def flatten(self, inputs: Any) -> list[Any]:
        """The flat list of inputs in the order of the example, from a tensor, a tuple, or a dict by name."""
        return _data.parse_item(inputs, self.fields, True, "inputs")[0]

    def structure(self, flat: list[Any]) -> Any:
        """Flat inputs in the structure of `example_inputs`; a single input of a tuple is given bare."""
        if isinstance(self.example_inputs, dict):
            return dict(zip(self.example_inputs, flat, strict=True))
        return flat[0] if len(flat) == 1 else tuple(flat)

    @property
    def fields(self) -> Fields:
        """Names, dtypes and ranks of the inputs."""
        by_name = isinstance(self.example_inputs, dict)
        names = tuple(self.example_inputs) if by_name else tuple(str(i) for i in range(len(self.example_inputs)))
        tensors = list(self.example_inputs.values()) if by_name else list(self.example_inputs)
        dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        return Fields(names, dtypes, tuple(tensor.ndim for tensor in tensors), by_name)

    def model_module(self) -> nn.Module:
        """A deep copy of the model, on the CPU and in evaluation mode; a function that builds it is called once.

        Raises:
            UsageError: not an nn.Module. DataError: parameters that are not finite, or double-precision inputs to a single-precision model.
        """
        from torch import nn

        if self._built is None:
            if isinstance(self.model, nn.Module):
                built = self.model
            else:
                with settled_randomness(0):
                    built = self.model()
            if not isinstance(built, nn.Module):
                raise UsageError(f"model: the function must return an nn.Module; got {type(built).__name__}")
            self._check_parameters(built)
            self._built = built
        return deep_copy(self._built).cpu().eval()

    def _check_parameters(self, module: nn.Module) -> None:
        import torch

        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise DataError(f"model: the parameter {name!r} holds NaN or infinity; nothing can be measured against it")
        kinds = {parameter.dtype for parameter in module.parameters()}
        for name, dtype in zip(self.fields.names, self.fields.dtypes, strict=True):
            if dtype == "float64" and kinds and torch.float64 not in kinds:
                raise DataError(f"example_inputs: {name!r} is float64 and the model's parameters are not; cast it with .float()")

    def metric_object(self, signature: Signature | None = None) -> Metric:
        """The metric; a function gets its outputs as `signature` says (without one: bare if single, else a tuple).

        With `evaluate` the result only carries the name and the direction: it scores a `predict` function, not outputs.
        """
        if self.evaluate is not None:
            return Metric("evaluate", self.higher_is_better, None, None, False, False, _no_outputs, None, is_fast=False)
        if isinstance(self.metric, str):
            return get_metric(self.metric)
        structure = signature.unflatten if signature is not None else lambda flat: flat[0] if len(flat) == 1 else tuple(flat)
        return function_metric(self.metric, self.higher_is_better, structure)

    def evaluated(self, predict: Callable[[Any], Any], seed: int) -> float:
        """The quality of a net by `evaluate`, with Python's, numpy's and torch's global random states fixed by `seed`."""
        assert self.evaluate is not None
        with settled_randomness(seed):
            return float(self.evaluate(predict))

    def score(self, outputs: Any, targets: Any) -> float:
        """The metric of outputs in the model's structure (torch or numpy); targets likewise, or the original's outputs."""
        metric = self.metric_object()
        if not isinstance(self.metric, str) and self.evaluate is None:
            return float(self.metric(outputs, targets))
        flat = [_data.as_array(value, "outputs") for value in _leaves(outputs)]
        if metric.needs_labels:
            return metric.score(flat, None if targets is None else _data.as_array(targets, "targets"))
        return metric.score(flat, [_data.as_array(value, "targets") for value in _leaves(targets)])

    def check_targets(self, data: Data, outputs: Any) -> None:
        """Refuse labels that do not fit the model's flat `outputs` (of any samples); for once the model has run.

        Raises:
            DataError: names the split and the sample.
        """
        if not isinstance(self.metric, str) or self.evaluate is not None:
            return
        metric = self.metric_object()
        flat = [_data.as_array(value, "outputs") for value in outputs]
        for name, split in data.splits().items():
            judged = name in ("validation", "test")
            if name != "calibration" and (judged or split.targets is not None):
                check_targets(metric, flat, split.targets, name)

    def materialize(self, folder: Path) -> Data:
        """Read every split once, in a fixed order, into memory-mapped arrays under `folder`, with bounded memory.

        Random states (Python's, numpy's, torch's) are fixed while reading and put back, so that a shuffling DataLoader gives the same
        order each time. A generator is read the first time; asked again, its arrays are copied from there.

        Raises:
            DataError: names the split, the batch or sample, and the field. UsageError: `folder` cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with settled_randomness(0):
                self._data = self._materialize(folder)
        except OSError as err:
            raise UsageError(
                f"{folder}: the data cannot be written there ({err.strerror or err}); free space or choose another --out"
            ) from err
        return self._data

    def _materialize(self, folder: Path) -> Data:
        notes: list[str] = []
        digest = hashlib.sha256()
        found: dict[str, Split | None] = {}
        for name in ("train", "validation", "test", "calibration"):
            source = getattr(self, name)
            if source is None:
                found[name] = None
                continue
            if _data.is_read_once(source) and self._data is not None:
                source = self._reread(name)
            writer = SplitWriter(folder, name, self.fields, name == "calibration", not isinstance(self.metric, str))
            try:
                for inputs, target, where in _data.read(source, name, self.fields, name == "calibration"):
                    writer.add(inputs, target, where)
                found[name] = writer.close(notes)
            except BaseException:
                writer.abandon()
                raise
            digest.update(f"{name} {writer.digest()}\n".encode())
        train, validation, test = found["train"], found["validation"], found["test"]
        if train is not None and validation is None:
            train, validation = _hold_out(train, folder, notes)
        calibration = found["calibration"] or _calibration(train, validation, test, folder, notes)
        if calibration is None:
            notes.append("calibration: no data was given, so statistics are taken on the example inputs alone; they are coarse.")
            calibration = Split([np.array(_data.as_array(t, "example_inputs")) for t in self._example_flat()], None, self._example_batch())
        data = Data(train, validation, test, calibration, folder, notes, digest.hexdigest())
        self._check_labels(data)
        return data

    def _reread(self, name: str) -> list[Any]:
        assert self._data is not None
        before: Split | None = getattr(self._data, name)
        if name == "train" and self.validation is None:
            raise DataError("train: a generator can be read only once, and it was; give a list of batches, a Dataset or a DataLoader")
        assert before is not None
        structured = [(self.structure(inputs), targets) for inputs, targets in before.batches(1024)]
        return structured if len(self.fields.names) == 1 or self.fields.by_name else [(tuple(i), t) for i, t in structured]

    def _example_flat(self) -> list[Any]:
        return list(self.example_inputs.values()) if isinstance(self.example_inputs, dict) else list(self.example_inputs)

    def _example_batch(self) -> int:
        return int(self._example_flat()[0].shape[0])

    def _check_labels(self, data: Data) -> None:
        if self.evaluate is not None or not isinstance(self.metric, str) or not get_metric(self.metric).needs_labels:
            return
        name, split = data.judged
        if split is None:
            return
        if split.targets is None:
            raise DataError(f"{name}: the metric {self.metric!r} needs labels and this split has none; give targets, or metric='agreement'")
        if self.metric in ("accuracy", "f1", "perplexity") and split.targets.dtype.kind in "iu":
            bad = np.argwhere((split.targets.astype(np.int64) < 0) & (split.targets != _data.IGNORED_LABEL))
            if len(bad):
                value = split.targets[tuple(bad[0])]
                raise DataError(
                    f"{name}: labels must be at least 0 (or {_data.IGNORED_LABEL} to be ignored); sample {bad[0][0]} has {value}"
                )
            if split.n > 1 and self.metric != "perplexity" and len(np.unique(split.targets)) == 1:
                data.notes.append(f"{name}: every label is {split.targets.flat[0]}; {self.metric} on one class says little.")

    def fingerprint(self, data: Data) -> dict[str, str]:
        """The job's identity in parts, "parameters", "data", "functions" and "version" -> hex, so that a difference can be named."""
        return {
            "parameters": _parameters_digest(self.model_module()),
            "data": data.digest,
            "functions": self._functions_digest(),
            "version": hashlib.sha256(self.version.encode()).hexdigest(),
        }

    def _functions_digest(self) -> str:
        whole = hashlib.sha256()
        for what in ("metric", "evaluate", "loss", "augment"):
            value = getattr(self, what)
            whole.update(f"{what}: {value if value is None or isinstance(value, str) else source_of(value)}\n".encode())
        whole.update(f"{self.higher_is_better} {sorted(self.state.items())} {self.fields}\n".encode())
        for tensor in self._example_flat():
            whole.update(f"{list(tensor.shape)}\n".encode())
        kinds = {type(module) for module in self.model_module().modules()}
        for kind in sorted(kinds, key=lambda k: f"{k.__module__}.{k.__qualname__}"):
            if not kind.__module__.startswith("torch."):
                whole.update(f"{kind.__qualname__}: {source_of(kind)}\n".encode())
        return whole.hexdigest()


def _no_outputs(outputs: Any, targets: Any) -> Any:
    raise UsageError("evaluate: this job is judged by evaluate(predict), not by outputs and targets")


def _leaves(outputs: Any) -> list[Any]:
    if hasattr(outputs, "keys"):
        return [outputs[key] for key in outputs]
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _example(given: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The example inputs as a tuple or dict of tensors, checked."""
    wanted = "example_inputs: must be a tuple or a dict of tensors, one batch"
    if hasattr(given, "keys") and hasattr(given, "__getitem__"):
        items = {str(key): given[key] for key in given}
    elif isinstance(given, (tuple, list)):
        items = {str(i): value for i, value in enumerate(given)}
    elif hasattr(given, "shape"):
        items, given = {"0": given}, (given,)
    else:
        raise DataError(f"{wanted}; got {type(given).__name__}")
    if not items:
        raise DataError(f"{wanted}; it is empty")
    for name, value in items.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise DataError(f"{wanted}; {name!r} is {_data.describe(value)}")
        if len(value.shape) == 0 or 0 in tuple(value.shape):
            raise DataError(
                f"{wanted}; {name!r} has shape {list(value.shape)}, but every size must be at least 1, with the sample axis first"
            )
        array = _data.as_array(value, f"example_inputs: {name!r}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"example_inputs: {name!r} must be finite; it holds NaN or infinity")
    counts = {name: int(value.shape[0]) for name, value in items.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{wanted}; all must have the same number of samples on axis 0, got {counts}")
    if any(isinstance(value, np.ndarray) for value in items.values()):
        import torch

        items = {name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value for name, value in items.items()}
    return items if hasattr(given, "keys") else tuple(items.values())


def _hold_out(train: Split, folder: Path, notes: list[str]) -> tuple[Split, Split | None]:
    count = min(_HELD_OUT, train.n // 10 or int(train.n > 1))
    if count == 0:
        notes.append("validation: none was given, and one sample of train cannot be divided.")
        return train, None
    at = train.n - count
    if _data.shows_every_class(train, slice(at, None)):
        notes.append(f"validation: none was given, so the last {count} samples of train were held out.")
        return train.rows(0, at), train.rows(at, train.n)
    notes.append(
        f"validation: none was given, so {count} samples of train were held out, evenly spaced, since the last ones lack some of the classes."
    )
    chosen = np.linspace(0, train.n - 1, count).astype(np.int64)
    rest = np.setdiff1d(np.arange(train.n), chosen)
    return _data.write_rows(folder, "train-rest", train, rest), _data.write_rows(folder, "held-out", train, chosen)


def _calibration(train: Split | None, validation: Split | None, test: Split | None, folder: Path, notes: list[str]) -> Split | None:
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if split is None:
            continue
        count = min(_CALIBRATION, split.n)
        if name == "test":
            notes.append("calibration: only test was given, so statistics are taken on inputs of test (without labels).")
        if name == ("test" if test is not None else "validation"):
            notes.append(
                f"recovery follows the original on {count} inputs of {name}, on which the drop is judged: it is optimistic; give `train`"
            )
        if _data.shows_every_class(split, slice(0, count)):
            return Split([array[:count] for array in split.inputs], None, count)
        notes.append(f"calibration: {count} samples of {name}, evenly spaced, since the first ones lack some of the classes.")
        chosen = np.linspace(0, split.n - 1, count).astype(np.int64)
        return _data.write_rows(folder, "calibration", Split(split.inputs, None, split.n), chosen)
    return None


@contextlib.contextmanager
def settled_randomness(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and (if loaded) torch's global generators inside the block, and put their states back after it."""
    torch = sys.modules.get("torch")
    legacy = np.random.get_state()  # noqa: NPY002  (the user's functions may draw from it)
    before = random.getstate(), legacy, torch.get_rng_state() if torch else None
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the user's functions may draw from it)
    if torch:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002  (the user's functions may draw from it)
        if torch and before[2] is not None:
            torch.set_rng_state(before[2])


def _parameters_digest(module: nn.Module) -> str:
    import torch

    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            whole.update(f"{name} {tensor!r}\n".encode())
            continue
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def source_of(value: Any) -> str:
    """What a function, class or callable object does, as text: its source without comments and layout, else its code.

    Values that a closure, a default or a `functools.partial` binds are included where they are plain.
    """
    if hasattr(value, "func") and hasattr(value, "keywords"):
        return f"partial {source_of(value.func)} {_plain(value.args)} {_plain(value.keywords)}"
    if not (inspect.isfunction(value) or inspect.ismethod(value) or inspect.isclass(value) or inspect.isbuiltin(value)):
        return f"{_text(type(value))} {_plain(vars(value)) if hasattr(value, '__dict__') else ''}"
    function = getattr(value, "__func__", value)
    cells = [cell.cell_contents for cell in (getattr(function, "__closure__", None) or ()) if _is_filled(cell)]
    return f"{_text(value)} {_plain(cells)} {_plain(getattr(function, '__defaults__', None))}"


def _text(value: Any) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        return _code(value.__code__) if hasattr(value, "__code__") else f"{value.__module__}.{value.__qualname__}"
    try:
        return ast.dump(ast.parse(text))
    except SyntaxError:  # a lambda in the middle of an expression: the line as it stands
        return text


def _code(code: Any) -> str:
    constants = [_code(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _plain(value: Any) -> str:
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_plain(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(part)}" for key, part in sorted(value.items(), key=lambda kv: str(kv[0]))) + "}"
    if inspect.isfunction(value):
        return _text(value)
    return f"<{type(value).__qualname__}>"

"""Splits and how they are read: whatever a user calls a data set becomes memory-mapped arrays, once, in a fixed order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from planish.errors import DataError, PlanishError
from planish.signature import Signature

_CHUNK_BYTES = 16 * 2**20
IGNORED_LABEL = -100  # torch's own convention: positions with this label do not count


@dataclass(frozen=True)
class Split:
    """Samples in a fixed order.

    Args:
        inputs: one array per input, in the order of the example inputs, shape [n, ...]. Mapped copy-on-write, so that torch may
            wrap a slice without a warning and nothing can change the file.
        targets: shape [n, ...], or None.
        n: how many samples.
    """

    inputs: list[NDArray[Any]]
    targets: NDArray[Any] | None
    n: int

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[tuple[list[NDArray[Any]], NDArray[Any] | None]]:
        """Batches of at most `size` samples: views in the split's own order, or copies of the samples that `order` names."""
        if order is None:
            for start in range(0, self.n, size):
                rows = slice(start, start + size)
                yield [array[rows] for array in self.inputs], None if self.targets is None else self.targets[rows]
        else:
            for start in range(0, len(order), size):
                index = order[start : start + size]
                yield [array[index] for array in self.inputs], None if self.targets is None else self.targets[index]

    def rows(self, start: int, stop: int) -> Split:
        """The samples from `start` to `stop`, as views."""
        targets = None if self.targets is None else self.targets[start:stop]
        return Split([array[start:stop] for array in self.inputs], targets, max(0, min(stop, self.n) - start))

    def take(self, index: NDArray[np.int64]) -> Split:
        """Copies of the samples that `index` names, in its order."""
        targets = None if self.targets is None else self.targets[index]
        return Split([array[index] for array in self.inputs], targets, len(index))


@dataclass(frozen=True)
class Data:
    """A job's data, materialised.

    Args:
        train, validation, test: None where the job has none.
        calibration: inputs only; what statistics are taken on. Always there.
        folder: where the arrays lie; other per-job caches may be put beside them.
        notes: sentences for the report on what was assumed.
        digest: SHA-256 of every array that was read.
    """

    train: Split | None
    validation: Split | None
    test: Split | None
    calibration: Split
    folder: Path
    notes: list[str] = field(default_factory=list)
    digest: str = ""

    @property
    def judged(self) -> tuple[str, Split | None]:
        """The split that quality is judged on: ("test", ...), else ("validation", ...), else ("", None)."""
        if self.test is not None:
            return "test", self.test
        return ("validation", self.validation) if self.validation is not None else ("", None)

    @property
    def labelled(self) -> Split | None:
        """Samples with targets that may be learnt from: train, else validation; None where neither has targets."""
        return next((split for split in (self.train, self.validation) if split is not None and split.targets is not None), None)

    def splits(self) -> dict[str, Split]:
        """Every split that there is, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test, "calibration": self.calibration}
        return {name: split for name, split in named.items() if split is not None}

    def check(self, signature: Signature) -> None:
        """Refuse data whose fixed sizes are not those that the captured model takes.

        Raises:
            DataError: names the split and the input.
        """
        for name, split in self.splits().items():
            signature.check([array[:1] for array in split.inputs], name)


@dataclass(frozen=True)
class Fields:
    """What the example inputs say about every batch: field names, dtypes and ranks (with the sample axis), tuple or dict."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    by_name: bool


def is_array(value: Any) -> bool:
    """Whether `value` is a tensor, an array or a number (not a container of them)."""
    return isinstance(value, (np.ndarray, np.generic, int, float)) or (hasattr(value, "detach") and hasattr(value, "shape"))


def as_array(value: Any, where: str) -> NDArray[Any]:
    """A numpy array from a tensor, an array, a number or a list of numbers.

    Raises:
        DataError: nothing of that kind, or a dtype that numpy has not.
    """
    if hasattr(value, "detach"):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype == "bfloat16":
            raise DataError(f"{where}: must be of a dtype that numpy has; got bfloat16; cast it to float32")
        array: NDArray[Any] = value.detach().cpu().numpy()
        return array
    if not isinstance(value, (np.ndarray, np.generic, int, float, list)):
        raise DataError(f"{where}: must be a tensor, an array or a number; got {type(value).__name__}")
    try:
        array = np.asarray(value)
    except ValueError as err:
        raise DataError(f"{where}: a list of numbers must be rectangular; it is ragged") from err
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: must hold numbers; got dtype {array.dtype}")
    return array


def parse_item(item: Any, fields: Fields, inputs_only: bool, where: str) -> tuple[list[Any], Any]:
    """Flat inputs and target from one sample or batch.

    The rule, for a model that takes n inputs given as a tuple: `(inputs, target)` with `inputs` a tensor (n = 1) or a tuple of n; or n
    inputs and a target in one flat tuple; or the n inputs alone, bare or as a tuple. Only where n = 2 could two bare tensors be taken
    for `(inputs, target)` with an input forgotten: they are refused, unless the split has inputs only (calibration). For a model whose
    example inputs are a dict: `(dict, target)`, or the dict alone.

    Raises:
        DataError: none of these forms.
    """
    n = len(fields.names)
    is_mapping = hasattr(item, "keys") and hasattr(item, "__getitem__")
    if fields.by_name:
        target = None
        if isinstance(item, (tuple, list)) and 1 <= len(item) <= 2:
            item, target = item[0], item[1] if len(item) == 2 else None
        if not (hasattr(item, "keys") and hasattr(item, "__getitem__")):
            raise DataError(f"{where}: example_inputs is a dict, so give ({{{', '.join(fields.names)}}}, target); got {describe(item)}")
        missing = [name for name in fields.names if name not in item]
        unknown = [str(name) for name in item if name not in fields.names]
        if missing or unknown:
            raise DataError(f"{where}: inputs must have the keys {list(fields.names)}; missing {missing}, unknown {unknown}")
        return [item[name] for name in fields.names], target
    if is_mapping and not isinstance(item, (tuple, list)):
        raise DataError(f"{where}: got a dict, but example_inputs is a tuple; give example_inputs as a dict too")
    if not isinstance(item, (tuple, list)):
        item = (item,)
    parts = list(item)
    if len(parts) == 2 and isinstance(parts[0], (tuple, list)) and all(is_array(part) for part in parts[0]) and not _is_numbers(parts[0]):
        if len(parts[0]) != n:
            raise DataError(f"{where}: the model takes {n} inputs ({', '.join(fields.names)}); got {len(parts[0])}")
        return list(parts[0]), parts[1]
    if len(parts) == n + 1:
        return parts[:n], parts[n]
    if len(parts) == n and (n != 2 or inputs_only):
        return parts, None
    if len(parts) == n:
        raise DataError(f"{where}: two bare tensors could be (inputs, target); write ((a, b), target), or ((a, b), None) without a target")
    raise DataError(f"{where}: must be (inputs, target) with {n} input{'s' * (n > 1)}; got {describe(item)}")


def _is_numbers(value: Any) -> bool:
    return all(isinstance(part, (int, float, np.generic)) for part in value)


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, (tuple, list)):
        inner = ", ".join(describe(part) for part in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"a {type(value).__name__} ({inner})"
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {list(value.shape)}"
    return type(value).__name__


class _Column:
    """One .npy file that grows along axis 0; the header has room for the final count."""

    def __init__(self, path: Path, dtype: np.dtype[Any], tail: tuple[int, ...]) -> None:
        self.path, self.dtype, self.tail, self.count = path, dtype, tail, 0
        self.digest = hashlib.sha256()
        self.file: BinaryIO = path.with_suffix(".part").open("w+b")
        self._header()
        self.start = self.file.tell()

    def _header(self) -> None:
        shape = (self.count, *self.tail)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )

    def append(self, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array, self.dtype)
        if array.size:
            view = array.reshape(-1).view(np.uint8).data
            self.file.write(view)
            self.digest.update(view)
        self.count += len(array)

    def close(self) -> NDArray[Any]:
        self.file.seek(0)
        self._header()
        assert self.file.tell() == self.start, "the header of a growing .npy file must not change its length"
        self.file.close()
        self.path.with_suffix(".part").replace(self.path)
        return open_array(self.path)

    def abandon(self) -> None:
        self.file.close()
        self.path.with_suffix(".part").unlink(missing_ok=True)


def open_array(path: Path) -> NDArray[Any]:
    """The array in a .npy file, mapped copy-on-write: it looks writable (torch then does not warn), the file never changes."""
    mapped = np.load(path, mmap_mode="c", allow_pickle=False)
    return np.asarray(mapped)


class SplitWriter:
    """Writes one split batch by batch, checking each.

    Args:
        folder: where `NAME.input0.npy` ... and `NAME.targets.npy` go.
        name: the split's name, used in every message.
        fields: what the example inputs say.
        inputs_only: drop targets (calibration).
        allow_missing: NaN targets are allowed (the user's own metric may mean something by them).
    """

    def __init__(self, folder: Path, name: str, fields: Fields, inputs_only: bool = False, allow_missing: bool = False) -> None:
        self.folder, self.name, self.fields = folder, name, fields
        self.inputs_only, self.allow_missing = inputs_only, allow_missing
        self.columns: list[_Column] = []
        self.targets: _Column | None = None
        self.has_targets: bool | None = None
        self.casts: dict[str, str] = {}
        self.n = 0

    def add(self, inputs: Sequence[Any], target: Any, where: str) -> None:
        """Append one batch.

        Raises:
            DataError: names `where` (the split and the number of the batch) and the field.
        """
        arrays = [self._input(i, as_array(value, f"{where}, input {self.fields.names[i]!r}"), where) for i, value in enumerate(inputs)]
        counts = {len(array) for array in arrays}
        if len(counts) != 1:
            sizes = ", ".join(f"{name!r} has {len(array)}" for name, array in zip(self.fields.names, arrays, strict=True))
            raise DataError(f"{where}: every input must have the same number of samples; {sizes}")
        (count,) = counts
        if not self.columns:
            self.columns = [_Column(self.folder / f"{self.name}.input{i}.npy", a.dtype, a.shape[1:]) for i, a in enumerate(arrays)]
        for column, array, field_name in zip(self.columns, arrays, self.fields.names, strict=True):
            if array.shape[1:] != column.tail:
                raise DataError(
                    f"{where}, input {field_name!r}: samples must have one shape; got {list(array.shape[1:])} after {list(column.tail)}; "
                    "pad or crop them to one size"
                )
        self._target(target, count, where)
        for column, array in zip(self.columns, arrays, strict=True):
            column.append(array)
        self.n += count

    def _input(self, i: int, array: NDArray[Any], where: str) -> NDArray[Any]:
        where = f"{where}, input {self.fields.names[i]!r}"
        want, rank = self.fields.dtypes[i], self.fields.ranks[i]
        if array.ndim != rank:
            hint = ""
            if array.ndim == rank - 1:
                hint = "; batches need a sample axis in front"
            elif array.ndim == rank + 1:
                hint = "; items of a Dataset are single samples, without a batch axis"
            raise DataError(f"{where}: a batch must have {rank} axes like the example; got shape {list(array.shape)}{hint}")
        if str(array.dtype) != want:
            wanted = np.dtype(want)
            widens = array.dtype.kind in "iu" and wanted.kind in "iu" and np.can_cast(array.dtype, wanted)
            if not widens and not (array.dtype.kind == "f" and wanted.kind == "f"):
                raise DataError(f"{where}: must be {want} like the example; got {array.dtype}; cast it, or change example_inputs")
            self.casts[self.fields.names[i]] = f"{array.dtype} to {want}"
            array = array.astype(wanted)
        self._finite(array, where)
        return array

    def _target(self, target: Any, count: int, where: str) -> None:
        if self.inputs_only:
            return
        if self.has_targets is None:
            self.has_targets = target is not None
        if self.has_targets != (target is not None):
            raise DataError(
                f"{where}, target: either every batch has a target or none; this one has {'one' if target is not None else 'none'}"
            )
        if target is None:
            return
        array = as_array(target, f"{where}, target")
        if array.ndim == 0 or len(array) != count:
            raise DataError(f"{where}, target: must have one entry per sample ({count}); got shape {list(array.shape)}")
        if array.dtype.kind == "f" and not self.allow_missing:
            self._finite(array, f"{where}, target")
        if self.targets is None:
            self.targets = _Column(self.folder / f"{self.name}.targets.npy", array.dtype, array.shape[1:])
        if array.shape[1:] != self.targets.tail:
            shapes = f"got {list(array.shape[1:])} after {list(self.targets.tail)}"
            raise DataError(f"{where}, target: targets must have one shape; {shapes}; pad them (label {IGNORED_LABEL} is ignored)")
        if array.dtype != self.targets.dtype and (array.dtype.kind == "f") != (self.targets.dtype.kind == "f"):
            raise DataError(f"{where}, target: must be {self.targets.dtype} as before; got {array.dtype}")
        self.targets.append(array)

    @staticmethod
    def _finite(array: NDArray[Any], where: str) -> None:
        if array.dtype.kind != "f":
            return
        rows = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(array), rows):
            good = np.isfinite(array[start : start + rows])
            if not good.all():
                bad = int(np.argwhere(~good)[0][0]) + start
                kind = "NaN" if np.isnan(array[bad]).any() else "infinity"
                raise DataError(f"{where}: must be finite; sample {bad} of this batch holds {kind}")

    def close(self, notes: list[str]) -> Split:
        """The finished split.

        Raises:
            DataError: nothing came.
        """
        if self.n == 0:
            self.abandon()
            raise DataError(f"{self.name}: must hold at least one sample; it is empty")
        for name, cast in self.casts.items():
            notes.append(f"{self.name}: input {name!r} was cast from {cast}, the example's dtype.")
        if self.n == 1:
            notes.append(f"{self.name}: a single sample says little; every figure on it is uncertain.")
        inputs = [column.close() for column in self.columns]
        return Split(inputs, None if self.targets is None else self.targets.close(), self.n)

    def abandon(self) -> None:
        """Remove what was begun."""
        for column in [*self.columns, *([self.targets] if self.targets else [])]:
            column.abandon()

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the split's arrays."""
        whole = hashlib.sha256()
        for column in [*self.columns, *([self.targets] if self.targets else [])]:
            whole.update(f"{column.path.name} {column.dtype.str} {(column.count, *column.tail)} {column.digest.hexdigest()}\n".encode())
        return whole.hexdigest()


def _is_a(value: Any, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("torch.") for kind in type(value).__mro__)


def is_read_once(source: Any) -> bool:
    """Whether reading `source` uses it up (a generator)."""
    return source is not None and hasattr(source, "__next__")


def _bulk(source: Any) -> tuple[tuple[Any, ...], Any] | None:
    """The tensors of a TensorDataset, and the index that a Subset (of a Subset ...) of one selects; None for anything else."""
    if not type(source).__module__.startswith("torch."):
        return None  # a subclass may change what a sample is
    if _is_a(source, "TensorDataset"):
        return tuple(source.tensors), None
    if _is_a(source, "Subset"):
        inner = _bulk(source.dataset)
        if inner is not None:
            index = np.asarray(source.indices, np.int64)
            return inner[0], index if inner[1] is None else inner[1][index]
    return None


def _collate(samples: Sequence[tuple[list[Any], Any]], fields: Fields, first: int, name: str) -> tuple[list[Any], Any]:
    """One batch from single samples, naming the first that does not fit the others."""

    def stack(values: list[Any], what: str) -> NDArray[Any]:
        arrays = [as_array(value, f"{name}: sample {first + i}, {what}") for i, value in enumerate(values)]
        for i, array in enumerate(arrays):
            if array.shape != arrays[0].shape:
                raise DataError(
                    f"{name}: sample {first + i}, {what}: samples must have one shape; got {list(array.shape)} after "
                    f"{list(arrays[0].shape)}; pad or crop them to one size"
                )
        return np.stack(arrays)

    inputs = [stack([sample[0][i] for sample in samples], f"input {field_name!r}") for i, field_name in enumerate(fields.names)]
    targets = [sample[1] for sample in samples]
    if all(target is None for target in targets):
        return inputs, None
    for i, target in enumerate(targets):
        if target is None:
            raise DataError(f"{name}: sample {first + i}, target: either every sample has a target or none; this one has none")
    return inputs, stack(targets, "target")


def _given(items: Iterator[Any], what: str) -> Iterator[Any]:
    """`items`; what the user's own code raises while it gives them is told as a fault of the data, with its place."""
    for i in itertools.count():
        try:
            item = next(items)
        except StopIteration:
            return
        except PlanishError:
            raise
        except Exception as err:
            raise DataError(f"{what} {i}: reading it failed: {type(err).__name__}: {err}") from err
        yield item


def _from_samples(items: Iterator[Any], name: str, fields: Fields, inputs_only: bool) -> Iterator[tuple[list[Any], Any, str]]:
    pending: list[tuple[list[Any], Any]] = []
    first, size = 0, 256
    for i, item in enumerate(_given(items, f"{name}: sample")):
        pending.append(parse_item(item, fields, inputs_only, f"{name}: sample {i}"))
        if i == 0:
            nbytes = sum(as_array(value, f"{name}: sample 0").nbytes for value in pending[0][0])
            size = int(np.clip(_CHUNK_BYTES // max(1, nbytes), 1, 4096))
        if len(pending) == size:
            yield *_collate(pending, fields, first, name), f"{name}: samples {first} to {i}"
            first, pending = i + 1, []
    if pending:
        yield *_collate(pending, fields, first, name), f"{name}: samples {first} to {first + len(pending) - 1}"


def read(source: Any, name: str, fields: Fields, inputs_only: bool = False) -> Iterator[tuple[list[Any], Any, str]]:
    """Batches of a split as `(flat inputs, target, where)`.

    Items of a Dataset (anything with `__len__` and `__getitem__`, or torch's IterableDataset) are samples; those of a DataLoader, a list
    or any other iterable are batches; a tensor, a dict, or a tuple that holds a tensor is the whole split as one batch.

    Raises:
        DataError: `source` is nothing of this kind, or an item has none of the forms of `parse_item`.
    """
    items: Iterator[Any]
    bulk = _bulk(source)
    if bulk is not None:
        tensors, index = bulk
        n = len(tensors[0]) if index is None else len(index)
        rows = int(np.clip(_CHUNK_BYTES // max(1, sum(t[:1].nbytes for t in tensors)), 1, 2**20))
        for start in range(0, n, rows):
            picked = slice(start, start + rows) if index is None else index[start : start + rows]
            where = f"{name}: samples {start} to {min(n, start + rows) - 1}"
            yield *parse_item(tuple(t[picked] for t in tensors), fields, inputs_only, where), where
        return
    whole = is_array(source) or isinstance(source, dict) or (isinstance(source, tuple) and any(is_array(part) for part in source))
    if whole:
        items = iter([source])
    elif isinstance(source, (list, tuple)):
        items = iter(source)
    elif hasattr(source, "dataset") and hasattr(source, "batch_sampler"):
        if source.batch_size is None and source.batch_sampler is None:
            yield from _from_samples(iter(source), name, fields, inputs_only)
            return
        items = iter(source)
    elif _is_a(source, "IterableDataset"):
        yield from _from_samples(iter(source), name, fields, inputs_only)
        return
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (str, bytes, Mapping)):
        yield from _from_samples((source[i] for i in range(len(source))), name, fields, inputs_only)
        return
    elif hasattr(source, "__iter__") and not isinstance(source, (str, bytes)):
        items = iter(source)
    else:
        raise DataError(f"{name}: must be a Dataset, a DataLoader or a list of batches (inputs, target); got {type(source).__name__}")
    for i, item in enumerate(_given(items, f"{name}: batch")):
        where = f"{name}: batch {i}"
        yield *parse_item(item, fields, inputs_only, where), where


def write_rows(folder: Path, name: str, split: Split, index: NDArray[np.int64]) -> Split:
    """The samples of `split` that `index` names, in new files: how a split is cut where a slice would not do."""

    def copy(array: NDArray[Any], file: str) -> NDArray[Any]:
        column = _Column(folder / file, array.dtype, array.shape[1:])
        rows = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(index), rows):
            column.append(array[index[start : start + rows]])
        return column.close()

    inputs = [copy(array, f"{name}.input{i}.npy") for i, array in enumerate(split.inputs)]
    targets = None if split.targets is None else copy(split.targets, f"{name}.targets.npy")
    return Split(inputs, targets, len(index))


def classes_in(targets: NDArray[Any] | None) -> NDArray[Any]:
    """The distinct integer labels in `targets` (shape [n]); empty for anything else."""
    if targets is None or targets.dtype.kind not in "biu" or targets.ndim != 1:
        return np.empty(0, np.int64)
    return np.unique(targets)


def shows_every_class(split: Split, rows: slice) -> bool:
    """Whether the samples in `rows` hold every class of the split (True where it has no classes, or very many).

    Data that is stored class by class would otherwise give a calibration or validation set of one class.
    """
    classes = classes_in(split.targets)
    return split.targets is None or not 1 < len(classes) <= 256 or len(classes_in(split.targets[rows])) == len(classes)

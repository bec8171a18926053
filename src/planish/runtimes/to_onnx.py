"""A graph as one ONNX file: batch norm folded, int8 as quantize / dequantize pairs, LSTM and GRU as ONNX's own operators, zeros packed.

Differs: `torch.onnx.export` decomposes every program again, which is most of its time (2.6 of 5.1 s for ResNet-56). Here the
operators that it would decompose are given a translation of their own, and the decomposition is skipped when nothing needs it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from planish.errors import UsageError
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Graph
from planish.graph.modes import set_mode, short_name
from planish.graph.qdq import is_quantized, to_qdq
from planish.graph.quiet import silenced
from planish.runtimes.codebooks import pack_codebooks
from planish.runtimes.onnx_operators import scatter_slices, translations
from planish.runtimes.onnx_recurrent import pack_recurrent, write_dequantized
from planish.runtimes.onnx_schemes import drop_zero_points, to_onnx_schemes
from planish.runtimes.packing import pack_zeros
from planish.runtimes.storage import FLOATS
from planish.signature import Signature

aten = torch.ops.aten
SINGLE_FILE_BYTES = 1_500_000_000
"""Weights above this lie beside the model, since a protobuf cannot hold 2 GB."""

_QUIET = ("torch.onnx", "onnxscript", "onnx_ir")


def to_onnx(graph: Graph, path: Path, rewrite: Callable[[Graph], Graph] | None = None) -> None:
    """Write the graph in eval mode to `path`; the same graph gives the same bytes.

    Inputs and outputs have the names of the signature (an output that would be named like an input gets the suffix "_out"; the
    order is always the signature's), and its dynamic axes.

    Args:
        graph: not changed.
        path: of the file; weights of more than 1.5 GB go to "NAME.data" beside it.
        rewrite: gives the same function in the form that a runtime prefers; called once batch norm is folded.

    Raises:
        UsageError: the program holds an operator that ONNX has not.
    """
    prepared = fold_batch_norm(graph)
    if rewrite is not None:
        prepared = rewrite(prepared)
    pack_recurrent(prepared.module)
    if is_quantized(prepared):
        prepared = to_qdq(to_onnx_schemes(prepared))
    model = traced(prepared)
    finish(model, graph.signature)
    if graph.floats != "fp32":
        model.metadata_props[FLOATS] = graph.floats
    pack_codebooks(model)
    pack_zeros(model)
    _save(model, path)


def traced(prepared: Graph, optimize: bool = True) -> ir.Model:
    """The ONNX model of a graph whose operators all have an ONNX form, with the exporter's names; the graph is changed.

    Raises:
        UsageError: an operator has none.
    """
    set_mode(prepared, training=False)
    _drop_dropout(prepared.module)
    _copy_passed_through(prepared.module)
    _split_means(prepared.module)
    prepared.module.recompile()
    with _quiet(), torch.no_grad():
        program = _trace(prepared)
        scatter_slices(program.graph)
        table = translations(program.graph)
        _skip_decomposition(program, table)
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=optimize,
                verbose=False,
                custom_translation_table=table,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            raise UsageError(
                f"to_onnx: every operator must have an ONNX form; {_innermost(error)}; leave this model to runtime 'torch'"
            ) from error
    assert exported is not None
    model = exported.model
    write_dequantized(model)
    drop_zero_points(model)
    return model


def _innermost(error: BaseException) -> str:
    """The first line of what started the chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says on every call, and let it build its registry of 1,200 operators only once."""
    with silenced(_QUIET), warnings.catch_warnings(), _registry_kept():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*|copyreg")  # torch calls its own old names
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*|onnxscript\..*|copyreg")
        yield


_registries: dict[Any, Any] = {}


@contextlib.contextmanager
def _registry_kept() -> Iterator[None]:
    """Within, the exporter's registry is a copy of the one that it built first (0.6 to 1.2 s saved per call).

    This reaches into a private name of torch; where that is gone, exports are only slower.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    original = ONNXRegistry.__dict__.get("from_torchlib")
    if not isinstance(original, classmethod):
        yield
        return

    def kept(cls: Any, *args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in _registries:
            _registries[key] = original.__func__(cls, *args, **kwargs)
        fresh = copy.copy(_registries[key])
        fresh.functions = {target: list(known) for target, known in _registries[key].functions.items()}
        return fresh

    ONNXRegistry.from_torchlib = classmethod(kept)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign, assignment]


def _trace(graph: Graph) -> torch.export.ExportedProgram:
    """The exported program of the prepared graph, which is not decomposed again if no operator asks for it."""
    inputs, shapes = [], []
    for spec, tensor in zip(graph.signature.inputs, graph.example, strict=True):
        free = [axis for axis, size in enumerate(spec.shape) if isinstance(size, str)]
        if 0 in free and tensor.shape[0] == 1:
            tensor = torch.cat([tensor, tensor])
        inputs.append(tensor)
        shapes.append(dict.fromkeys(free, torch.export.Dim.AUTO))
    program = torch.export.export(graph.module, tuple(inputs), dynamic_shapes=tuple(shapes), strict=False)
    for node in list(program.graph.nodes):
        if short_name(node) == "_assert_tensor_metadata":
            program.graph.erase_node(node)
    return program


def _skip_decomposition(program: torch.export.ExportedProgram, own: Collection[Callable[..., Any]]) -> None:
    """Make the program's decomposition the program itself where every operator has a translation, in place."""
    decompose: Callable[[Any], torch.export.ExportedProgram] = program.run_decompositions

    def decompose_if_needed(table: Any = None) -> torch.export.ExportedProgram:
        known = {target for registry in _registries.values() for target in registry.functions}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                return decompose(table)
            if node.op != "call_function" or node.target in own or node.target in known:
                continue
            if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable or _qualified(node.target) not in known:
                return decompose(table)
        return program

    program.run_decompositions = decompose_if_needed


def _qualified(target: torch._ops.OpOverload) -> str:
    """ "aten::add.Tensor", "aten::relu": as the exporter's registry names it."""
    schema = target._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def _drop_dropout(module: fx.GraphModule) -> None:
    """Erase the dropouts, which do nothing in eval mode, in place."""
    for node in list(module.graph.nodes):
        if short_name(node) in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _split_means(module: fx.GraphModule) -> None:
    """Means that are scattered become sums over counts, in place: ONNX has no such reduction, and torch's exporter then writes the last value."""
    for node in list(module.graph.nodes):
        if node.target is not aten.scatter_reduce.two or node.args[4] != "mean":
            continue
        x, dim, index, source, _ = node.args
        include_self = node.kwargs.get("include_self", True)
        with module.graph.inserting_before(node):
            call = module.graph.call_function
            start = (x, call(aten.ones_like.default, (x,))) if include_self else [call(aten.zeros_like.default, (x,))] * 2
            ones = call(aten.ones_like.default, (source,))
            total, count = (
                call(aten.scatter_add.default, (first, dim, index, added)) for first, added in zip(start, (source, ones), strict=True)
            )
            mean = call(aten.div.Tensor, (total, call(aten.clamp.default, (count, 1))))
            if not include_self:
                mean = call(aten.where.self, (call(aten.gt.Scalar, (count, 0)), mean, x))
        node.replace_all_uses_with(mean)
        module.graph.erase_node(node)


def _copy_passed_through(module: fx.GraphModule) -> None:
    """An output that is an input, a parameter or another output becomes a copy, so that every output has a value of its own."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    seen: set[fx.Node] = set()
    results = []
    for value in output.args[0]:
        if isinstance(value, fx.Node) and (value in seen or value.op in ("placeholder", "get_attr")):
            with module.graph.inserting_before(output):
                value = module.graph.call_function(aten.clone.default, (value,))
        seen.add(value)
        results.append(value)
    output.args = (tuple(results),)


def finish(model: ir.Model, signature: Signature) -> None:
    """Names and axes of the signature; nothing of the machine that exported (paths, versions, stack traces)."""
    graph = model.graph
    names = {spec.name for spec in signature.inputs}
    wanted_names = [spec.name for spec in signature.inputs]
    for spec in signature.outputs:
        wanted_names.append(spec.name if spec.name not in names else f"{spec.name}_out")
    outside = [*graph.inputs, *graph.outputs]
    taken = set(wanted_names)
    inside = [value for node in graph for value in node.outputs] + list(graph.initializers.values())
    for value in [*outside, *inside]:
        if value.name in taken:
            _rename(graph, value, f"{value.name}_inner")
    for value, name in zip(outside, wanted_names, strict=True):
        _rename(graph, value, name)
    for value, spec in zip(graph.inputs, signature.inputs, strict=True):
        value.shape = ir.Shape(list(spec.shape))
    for value, spec in zip(graph.outputs, signature.outputs, strict=True):
        value.shape = ir.Shape(list(spec.shape))
    for value in inside:
        value.metadata_props.clear()
        if value.shape is not None and value not in graph.outputs and not all(isinstance(size, int) for size in value.shape):
            # the exporter confuses symbols (two sequences, windows in the batch), and ONNX Runtime plans its memory by them
            value.shape = None
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in outside:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.name, graph.doc_string = "main", None
    model.producer_name, model.producer_version, model.doc_string = "planish", None, None


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.name is not None and value.name in graph.initializers and graph.initializers[value.name] is value:
        graph.initializers.pop(value.name)
        value.name = name
        graph.initializers[name] = value
    else:
        value.name = name


def _save(model: ir.Model, path: Path) -> None:
    """Write to a temporary file, check it, move it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if total > SINGLE_FILE_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data")
        onnx.checker.check_model(str(path))
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        onnx.checker.check_model(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)

"""Capture: any exportable `nn.Module` becomes a `Graph` that trains, evaluates and exports, with its parameter names kept."""

from __future__ import annotations

import contextlib
import keyword
import logging
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from planish.errors import CaptureError, UsageError
from planish.graph.blame import FORWARD_ERRORS, blame
from planish.graph.constants import fold_constants, graph_axes
from planish.graph.functional import functionalise
from planish.graph.graph import Graph
from planish.graph.modes import TRAIN_DROPOUT, has_mode, set_mode, short_name
from planish.graph.quiet import silenced
from planish.graph.recurrent import Recurrence, pick_states, to_aten
from planish.graph.structure import FlatCall, check_batch, flat_inputs
from planish.signature import Signature, Structure, TensorSpec
from planish.workload import deep_copy

aten = torch.ops.aten
_BOOKKEEPING = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_async")
_KEPT_META = ("nn_module_stack", "stack_trace", TRAIN_DROPOUT)  # sizes and fake tensors would go stale, and do not pickle
_TRACE_BATCHES = (2, 3, 5, 7, 11, 13, 17)
_TAKEN = frozenset(name for name, value in vars(fx.GraphModule).items() if isinstance(value, property))
_SPECIALISED = ("torch._export.non_strict_utils",)
"""Warns of every axis of size 1, which stays fixed."""


def capture(model: nn.Module, example_inputs: Any, state: Mapping[str, str] | None = None) -> Graph:
    """The program of a model as a graph in eval mode; the caller's model, its mode, and the random state stay as they were.

    Args:
        model: any module that `torch.export` can trace.
        example_inputs: a tensor, a tuple of tensors (positional) or a dict of tensors (by keyword), axis 0 of each being the batch.
        state: input name -> output name, for inputs that the caller feeds from the step before.

    Returns:
        A graph on the CPU. The batch is dynamic, and so are sequence axes (axes 1 and 2 of inputs with at most three axes) where
        the model allows; where not, a note says so.

    Raises:
        UsageError: the model is no module, an input is no tensor, or `state` names what is not there.
        DataError: the inputs do not share a batch.
        CaptureError: the model cannot run on its inputs or cannot be traced; the message names the line to blame.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"capture: the model must be a torch.nn.Module; got {type(model).__name__}; give the module, or a function that builds it"
        )
    _check_names(model)
    takes, inputs = flat_inputs(model, example_inputs)
    check_batch(inputs)
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _no_fused_attention():
        mine = _own_copy(model, notes)
        call = FlatCall(mine, list(inputs), takes)
        sizes = {size for tensor in inputs.values() for size in tensor.shape[1:]}
        traced = next(size for size in _TRACE_BATCHES if size not in sizes or size == _TRACE_BATCHES[-1])
        few = tuple(_resized(tensor, traced) for tensor in inputs.values())
        whole = tuple(inputs.values())
        is_dynamic = _runs(call, few)
        if not is_dynamic:
            try:
                call(*whole)
            except FORWARD_ERRORS as error:
                raise blame(model, error, traced=False, hint=_batch_hint(call, whole)) from error
        if not call.outputs:
            raise CaptureError(f"capture: {type(model).__name__} must give at least one tensor; it gives none")
        notes += call.notes
        dropouts = _train_dropouts(mine, call, few if is_dynamic else whole)
        if is_dynamic:
            program = _export_dynamic(model, mine, call, few, notes)
            axes = _axes(program, list(inputs))
            is_dynamic = all(isinstance(shape[0], str) for shape in axes.values())
        if not is_dynamic:
            notes.append("the batch is static, because the model works with its size as a number")
            program = _export(model, mine, call, whole, axes=0)
            axes = _axes(program, list(inputs))
    graph = _plain(program, mine, list(inputs))
    _check_no_chance(graph)
    _restore_dropouts(graph, dropouts, notes)
    signature = _signature(program, inputs, axes, call, takes, dict(state or {}))
    notes += _static_notes(inputs, axes)
    captured = Graph(graph, signature, tuple(tensor.clone() for tensor in inputs.values()), notes)
    set_mode(captured, training=False)
    return captured


def _batch_hint(call: FlatCall, inputs: Sequence[Tensor]) -> str:
    """What to say where the model takes these inputs once they have a batch axis in front: a single sample was given."""
    try:
        call(*[tensor[None] for tensor in inputs])
    except FORWARD_ERRORS:
        return ""
    return "it takes these inputs with a batch axis in front: give images[:1], not images[0]"


def _check_names(model: nn.Module) -> None:
    """Refuse names that torch.fx, which writes them into its program's source between quotes and does not escape them, would run as code."""
    for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers()):
        if '"' in name or "\\" in name or not name.isprintable():
            raise CaptureError(
                f"capture: {type(model).__name__} has a layer named {name[:80]!r}; torch.export cannot write quotes, backslashes or "
                "control characters in a name; rename it"
            )
        first = name.split(".")[0]
        if first in _TAKEN:
            raise CaptureError(
                f"capture: {type(model).__name__} has a layer named {first!r}, which is a property of torch.fx's own modules; rename it"
            )


def _check_no_chance(module: fx.GraphModule) -> None:
    """Refuse a program that draws random numbers in eval mode: no two runs of it could be compared. What has a mode draws none in eval mode."""
    for node in module.graph.nodes:
        is_drawn = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if is_drawn and node.users and not has_mode(node):
            lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace", ""))
            where = f"{lines[-1][0]}:{lines[-1][1]}: " if lines else ""
            raise CaptureError(
                f"capture: the model must give the same outputs for the same inputs in eval mode; {where}{short_name(node)} draws random "
                "numbers; use their mean unless self.training, or make them an input"
            )


def _resized(tensor: Tensor, size: int, axes: Iterable[int] = (0,)) -> Tensor:
    """A tensor with so many entries along some axes, repeated or left out."""
    for axis in axes:
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor


def _runs(call: FlatCall, flat: tuple[Tensor, ...]) -> bool:
    """Whether the model takes these inputs; where it takes no other batch than the example's, it does not."""
    try:
        call(*flat)
    except FORWARD_ERRORS:
        return False
    return True


def _own_copy(model: nn.Module, notes: list[str]) -> nn.Module:
    """A copy in eval mode on the CPU, without weight norm and other parametrizations, that gives no key-value cache."""
    mine = deep_copy(model).cpu().eval()
    for module in mine.modules():
        if parametrize.is_parametrized(module):
            _own_class(module)
        for name in list(getattr(module, "parametrizations", ())) if parametrize.is_parametrized(module) else ():
            with torch.enable_grad():  # else a weight made of several parameters would become a buffer
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hasattr(hook, "compute_weight") and hasattr(hook, "remove") and hasattr(hook, "name"):
                del module._forward_pre_hooks[key]
                hook.remove(module)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.momentum is None:
            module.momentum = 0.1
            notes.append("a batch norm with a cumulative average (momentum=None) averages with momentum 0.1 in training")
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return mine


def _own_class(module: nn.Module) -> None:
    """Gives a copy of a parametrized module a class of its own: torch makes one for every such module, a deep copy shares it, and removing the
    parametrization deletes from the class, which would break the caller's model."""
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


@contextlib.contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Keep `nn.TransformerEncoderLayer` from taking its fused path, which is one opaque operator, in eval mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _AttentionDropouts(TorchFunctionMode):
    """Records the dropout of every scaled_dot_product_attention, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)))
        return func(*args, **kwargs)


def _train_dropouts(mine: nn.Module, call: FlatCall, flat: tuple[Tensor, ...]) -> list[float]:
    """What attention's dropout is in train mode, per call, from one run; the buffers are put back as they were."""
    if not any(isinstance(module, nn.Dropout) or hasattr(module, "attention_dropout") for module in mine.modules()):
        return []
    modes = {module: module.training for module in mine.modules()}
    buffers = {name: buffer.clone() for name, buffer in mine.named_buffers()}
    recorder = _AttentionDropouts()
    mine.train()
    try:
        with recorder:
            call(*flat)
    except FORWARD_ERRORS:
        return []  # a model that cannot run in train mode on two samples keeps the literals of eval mode
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in mine.named_buffers():
            buffer.copy_(buffers[name])
    return recorder.seen


def _restore_dropouts(module: fx.GraphModule, dropouts: list[float], notes: list[str]) -> None:
    nodes = [node for node in module.graph.nodes if short_name(node) == "scaled_dot_product_attention"]
    if any(dropouts) and len(nodes) != len(dropouts):
        notes.append("attention's dropout stays off in training, because train and eval mode run different programs")
        return
    for node, dropout in zip(nodes, dropouts, strict=False):
        if dropout:
            node.meta[TRAIN_DROPOUT] = dropout


def _export_dynamic(
    model: nn.Module, mine: nn.Module, call: FlatCall, flat: tuple[Tensor, ...], notes: list[str]
) -> torch.export.ExportedProgram:
    """With sequence axes free as well; with the batch alone where tracing cannot follow one, or where it runs over a graph that is given."""
    try:
        program = _export(model, mine, call, flat, axes=3)
    except CaptureError as first:
        if all(tensor.dim() > 3 or tensor.dim() == 1 for tensor in flat):
            raise
        try:
            return _export(model, mine, call, flat, axes=1)
        except CaptureError:
            raise first from None
    names = _symbol_names(program)
    if any(names.get(symbol, "batch") != "batch" for symbol in graph_axes(program) or ()):
        notes.append("all axes but the batch are static, because the model holds a graph whose nodes lie along one of them")
        return _export(model, mine, call, flat, axes=1)
    if fixed := _fixed_size(program, call, flat):
        notes.append(f"all axes but the batch are static, because the model takes no other size than {fixed} along one of them")
        return _export(model, mine, call, flat, axes=1)
    return program


def _fixed_size(program: torch.export.ExportedProgram, call: FlatCall, flat: tuple[Tensor, ...]) -> int | None:
    """The size of an axis that tracing left free though the model takes no other there, as where 8 x 8 pixels become 16 patches: a runtime that
    was given another would fail, or answer with what it had in memory. None where each free axis takes some other size."""
    values = _input_values(program)
    sizes = [str(size) for value in values for size in value.shape]
    for symbol in dict.fromkeys(size for size in sizes if size.isidentifier() and size not in [str(value.shape[0]) for value in values]):
        if any(symbol in size for size in sizes if size != symbol):
            continue  # another axis is a multiple of it
        lies = [[axis for axis, size in enumerate(value.shape) if str(size) == symbol] for value in values]
        size = next(tensor.shape[axes[0]] for tensor, axes in zip(flat, lies, strict=True) if axes)
        others = [other for other in (size + 1, size - 1, 2 * size, size // 2) if other]
        if not any(_runs(call, tuple(_resized(tensor, other, axes) for tensor, axes in zip(flat, lies, strict=True))) for other in others):
            return size
    return None


def _export(model: nn.Module, mine: nn.Module, call: FlatCall, flat: tuple[Tensor, ...], axes: int) -> torch.export.ExportedProgram:
    """The program with so many leading axes free of inputs that have at most three, and the batch of others; with none for 0."""
    automatic = torch.export.Dim.AUTO
    free = [range(min(axes, tensor.dim()) if tensor.dim() <= 3 else 1) for tensor in flat]
    shapes = (tuple(dict.fromkeys(its, automatic) for its in free),) if axes else None
    mine.forward = types.MethodType(lambda _, *inputs: call(*inputs), mine)
    try:
        with silenced(_SPECIALISED, logging.ERROR), warnings.catch_warnings(), Recurrence():
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .* assigned during export")  # nn.RNNBase's flat weights
            return torch.export.export(mine, flat, dynamic_shapes=shapes, strict=False)
    except FORWARD_ERRORS as error:
        raise blame(model, error, traced=True) from error
    finally:
        del mine.forward


def _symbolic(shape: Iterable[Any], names: dict[str, str]) -> tuple[int | str, ...]:
    """The sizes of a shape; a symbol becomes its name in `names`, an expression one in these names."""
    sizes: list[int | str] = []
    for size in shape:
        text = re.sub(r"[A-Za-z]+\d+", lambda match: names.get(match[0], match[0]), str(size))
        sizes.append(int(text) if text.isdigit() else text)
    return tuple(sizes)


def _input_values(program: torch.export.ExportedProgram) -> list[Any]:
    wanted = program.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [values[str(name)] for name in wanted]


def _symbol_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    names: dict[str, str] = {}
    sequences = 0
    for value in _input_values(program):
        for axis, size in enumerate(value.shape):
            if str(size).isdigit() or str(size) in names:
                continue
            if axis == 0:
                names[str(size)] = "batch"
            else:
                sequences += 1
                names[str(size)] = "sequence" if sequences == 1 else f"sequence_{sequences}"
    return names


def _axes(program: torch.export.ExportedProgram, inputs: list[str]) -> dict[str, tuple[int | str, ...]]:
    names = _symbol_names(program)
    return {name: _symbolic(value.shape, names) for name, value in zip(inputs, _input_values(program), strict=True)}


def _static_notes(inputs: Mapping[str, Tensor], axes: Mapping[str, tuple[int | str, ...]]) -> list[str]:
    return [
        f"the sequence axis of {name!r} is static at {tensor.shape[1]}, because the model works with its size as a number"
        for name, tensor in inputs.items()
        if tensor.dim() == 2 and not tensor.is_floating_point() and isinstance(axes[name][1], int)
    ]


def _plain(program: torch.export.ExportedProgram, mine: nn.Module, names: list[str]) -> fx.GraphModule:
    """The program as a module of positional tensors, without guards and assertions."""
    lifted = program.module(check_guards=False)
    graph = lifted.graph
    for node in list(graph.nodes):
        if short_name(node) in _BOOKKEEPING or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    for node, name in zip((n for n in graph.nodes if n.op == "placeholder"), names, strict=True):
        safe = re.sub(r"\W", "_", name)
        safe = f"_{safe}" if safe[:1].isdigit() or keyword.iskeyword(safe) else safe
        node.target = node.name = graph._graph_namespace.create_name(safe, None)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0]),)
    functionalise(graph)
    to_aten(graph)
    pick_states(graph)
    graph.eliminate_dead_code()
    if graph_axes(program) is not None:
        fold_constants(lifted)
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_META}
    module = fx.GraphModule(lifted, graph)
    _retie(module, mine)
    module.graph.lint()
    return module


def _retie(module: fx.GraphModule, mine: nn.Module) -> None:
    """Give every alias of a parameter that the program uses its place in the module, so that tied weights keep all their names."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in mine.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for names in aliases.values():
        present = [name for name in names if _attribute(module, name) is not None]
        if len(names) > 1 and present:
            kept = _attribute(module, present[0])
            assert isinstance(kept, nn.Parameter)
            for name in names:
                _set_parameter(module, name, kept)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _set_parameter(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(leaf, parameter)


def _signature(
    program: torch.export.ExportedProgram,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, tuple[int | str, ...]],
    call: FlatCall,
    takes: Structure,
    state: dict[str, str],
) -> Signature:
    def dtype(tensor: Tensor) -> str:
        return str(tensor.dtype).removeprefix("torch.")

    names = _symbol_names(program)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    results = [values[str(name)] for name in program.graph_signature.user_outputs]
    outputs = tuple(
        TensorSpec(name, dtype(value), _symbolic(value.shape, names)) for name, value in zip(call.outputs, results, strict=True)
    )
    specs = tuple(TensorSpec(name, dtype(tensor), axes[name]) for name, tensor in inputs.items())
    by_input, by_output = {spec.name: spec for spec in specs}, {spec.name: spec for spec in outputs}
    for name, source in state.items():
        if name not in by_input or source not in by_output:
            raise UsageError(f"capture: state must map inputs {sorted(by_input)} to outputs {sorted(by_output)}; got {name!r}: {source!r}")
        if by_input[name].shape[1:] != by_output[source].shape[1:] or by_input[name].dtype != by_output[source].dtype:
            raise UsageError(
                f"capture: state {name!r} must have the shape and dtype of {source!r}; got {by_input[name].shape} {by_input[name].dtype} "
                f"and {by_output[source].shape} {by_output[source].dtype}"
            )
    return Signature(specs, outputs, takes, call.gives, state)

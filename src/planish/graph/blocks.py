"""Residual branches: found where an addition has one side that reaches the other's source without parameters, and bypassed there, or replaced by
a linear map of what goes past them (an adaptor)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from planish.errors import UnknownName
from planish.graph.facts import attribute, rule_name
from planish.graph.graph import Analysis, Block, Graph, Operator, Size
from planish.graph.naming import module_path, unique
from planish.graph.program import Program


def _ancestors(node: Node, stop: Collection[Node] = ()) -> set[Node]:
    """Everything that `node` is computed from, itself included, not looking beyond `stop`."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            if current not in stop:
                stack.extend(current.all_input_nodes)
    return found


aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
Sizes = Callable[[str], tuple[Size, ...]]


class _Finder:
    def __init__(self, program: Program, operators: Mapping[str, Operator], sizes: Sizes) -> None:
        self.program, self.operators, self.sizes = program, operators, sizes
        self.nodes = list(program.module.graph.nodes)
        self.parameters = {name for name, _ in program.module.named_parameters(remove_duplicate=False)}

    def _has_parameter(self, node: Node) -> bool:
        return any(a.op == "get_attr" and str(a.target) in self.parameters for a in node.all_input_nodes)

    def _tensor_inputs(self, node: Node) -> list[Node]:
        return [a for a in node.all_input_nodes if a.op != "get_attr" and self.program.facts.shapes.get(a.name) is not None]

    def _chain(self, node: Node) -> list[Node]:
        """`node`, and what it is computed from by operators of one input and no parameter."""
        chain = [node]
        while chain[-1].op == "call_function" and not self._has_parameter(chain[-1]) and len(self._tensor_inputs(chain[-1])) == 1:
            chain.append(self._tensor_inputs(chain[-1])[0])
        return chain

    def _dying(self, addition: Node, skip: Node) -> set[Node]:
        """The nodes that nothing needs once `addition` passes `skip` on."""
        needed: set[Node] = set()
        stack = [node for node in self.nodes if node.op in ("output", "placeholder")]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend([skip] if node is addition else node.all_input_nodes)
        return {node for node in self.nodes if node not in needed}

    def block(self, addition: Node, skip: Node, branch: Node) -> tuple[set[Node], set[str]] | None:
        """The nodes and parameters of the branch, if it starts where `skip` does and nowhere else."""
        shapes = self.program.facts.shapes
        if shapes[skip.name] != shapes[addition.name]:
            return None
        upstream = _ancestors(branch)
        source = next((node for node in self._chain(skip) if node in upstream), None)
        if source is None or source is branch:
            return None
        dying = self._dying(addition, skip)
        for node in _ancestors(branch, stop={source}) - {source}:
            if self._has_parameter(node) and node not in dying:
                return None
        names = {
            self.program.canonical(str(node.target)) for node in dying if node.op == "get_attr" and str(node.target) in self.parameters
        }
        if not names and not any(self._has_parameter(node) for node in dying):
            return None
        return dying, names

    def find(self) -> dict[str, Block]:
        found: dict[str, Block] = {}
        for node in self.nodes:
            if node.op != "call_function" or rule_name(node.target) != "add" or len(self._tensor_inputs(node)) != 2:
                continue
            first, second = self._tensor_inputs(node)
            for skip, branch in ((first, second), (second, first)):
                inside = self.block(node, skip, branch)
                if inside is None:
                    continue
                dying, parameters = inside
                gone = {n.name for n in dying}
                operators = tuple(o.name for o in self.operators.values() if o.node in gone)
                used = parameters or {str(a.target) for n in dying for a in n.all_input_nodes if a.op == "get_attr"}
                name = unique(_shared_path(used) or node.name, found)
                stream = self.sizes(node.name)
                found[name] = Block(
                    name,
                    node.name,
                    skip.name,
                    operators,
                    tuple(sorted(parameters)),
                    stream,
                    self._adaptor(operators, len(stream)) if not node.kwargs else "",
                )
                break
        return found

    def _adaptor(self, operators: Collection[str], rank: int) -> str:
        kinds = {self.operators[name].kind for name in operators}
        if "conv" in kinds:
            return "conv" if 3 <= rank <= 5 else ""
        return "linear" if kinds & {"linear", "matmul", "attention"} and rank >= 2 else ""


def _shared_path(parameters: Collection[str]) -> str:
    """The longest module path that all parameters share."""
    paths = [module_path(name).split(".") for name in parameters]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def find_blocks(program: Program, operators: Mapping[str, Operator], sizes: Sizes) -> dict[str, Block]:
    """The residual branches that can be bypassed, in the order of the program.

    Args:
        program: the ids.
        operators: of the program.
        sizes: name of a node -> the sizes of its value.
    """
    return _Finder(program, operators, sizes).find()


def sweep(graph: FxGraph) -> None:
    """Erase what nothing needs, operators that torch takes for impure included; placeholders stay."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def drop_unread(module: GraphModule) -> None:
    """Forget parameters and buffers that the program no longer reads, in place."""
    read = {id(attribute(module, str(node.target))) for node in module.graph.nodes if node.op == "get_attr"}
    for owner in list(module.modules()):
        for store in (owner._parameters, owner._buffers):
            for leaf in [leaf for leaf, tensor in store.items() if id(tensor) not in read]:
                del store[leaf]


def bypass(graph: Graph, analysis: Analysis, names: Collection[str], adapted: Collection[str] = ()) -> Graph:
    """A copy in which the branches of the named blocks are gone and their additions pass the skip on.

    Args:
        graph: left as it is.
        analysis: of that graph.
        names: of the blocks.
        adapted: those of them whose addition gets a linear map of the skip in the branch's place, BLOCK.adaptor, which is zero at first.

    Raises:
        UnknownName: a block that the analysis has not.
    """
    for name in names:
        if name not in analysis.blocks:
            raise UnknownName("block", name, analysis.blocks)
    original = {node.name: node for node in graph.module.graph.nodes}
    result = graph.copy()
    fx = result.module.graph
    nodes = {node.name: node for node in fx.nodes}
    for name in (name for name in analysis.blocks if name in set(names)):
        block = analysis.blocks[name]
        if block.node not in nodes or nodes[block.node] not in fx.nodes:
            continue
        at = [a.name for a in original[block.node].all_input_nodes].index(block.skip)
        addition = nodes[block.node]
        if name in adapted:
            _adapt(result.module, block, addition, at)
        else:
            addition.replace_all_uses_with(addition.all_input_nodes[at])
            fx.erase_node(addition)
    sweep(fx)
    drop_unread(result.module)
    fx.lint()
    result.module.recompile()
    return result


def _adapt(module: GraphModule, block: Block, addition: Node, at: int) -> None:
    """Puts a linear map of the skip, its operand number `at`, in the place of an addition's other operand."""
    assert block.adaptor, block.name
    spatial = len(block.stream) - 2 if block.adaptor == "conv" else 0
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(block.channels, block.channels, *[1] * spatial))
    layer.bias = nn.Parameter(torch.zeros(block.channels))
    name = f"{block.name}.adaptor"
    module.add_submodule(name, layer)
    skip, branch = addition.all_input_nodes[at], addition.all_input_nodes[1 - at]
    with module.graph.inserting_before(addition):
        target = _CONVOLUTIONS[spatial - 1] if spatial else aten.linear.default
        mapped = module.graph.call_function(
            target, (skip, module.graph.get_attr(f"{name}.weight"), module.graph.get_attr(f"{name}.bias")), name=f"adaptor_{addition.name}"
        )
    addition.replace_input_with(branch, mapped)


def narrow_adaptor(module: GraphModule, name: str, node: Node, down: torch.Tensor, up: torch.Tensor, shift: torch.Tensor) -> None:
    """Splits the adaptor of a block in two, in place: what it computes becomes `up @ (down @ x) + bias + shift`.

    Args:
        module: has the adaptor.
        name: of the block.
        node: that applies the adaptor.
        down: [rank, channels].
        up: [channels, rank].
        shift: [channels], of the bias.
    """
    layer, before = module.get_submodule(f"{name}.adaptor"), attribute(module, f"{name}.adaptor.weight")
    assert callable(node.target)
    ones = [1] * (before.dim() - 2)
    first = nn.Module()
    first.weight = nn.Parameter(down.reshape(*down.shape, *ones).to(before.dtype))
    module.add_submodule(f"{name}.adaptor_down", first)
    layer.weight = nn.Parameter(up.reshape(*up.shape, *ones).to(before.dtype))
    layer.bias = nn.Parameter(attribute(module, f"{name}.adaptor.bias").detach() + shift.to(before.dtype))
    with module.graph.inserting_before(node):
        less = module.graph.call_function(
            node.target, (node.args[0], module.graph.get_attr(f"{name}.adaptor_down.weight")), name=f"{node.name}_down"
        )
    node.update_arg(0, less)
    module.recompile()

"""Residual branches: found where an addition has one side that reaches the other's source without parameters, and bypassed there."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from planish.errors import UnknownName
from planish.graph.facts import attribute, rule_name
from planish.graph.graph import Analysis, Block, Graph, Operator
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


class _Finder:
    def __init__(self, program: Program, operators: Mapping[str, Operator]) -> None:
        self.program, self.operators = program, operators
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
                found[name] = Block(name, node.name, skip.name, operators, tuple(sorted(parameters)))
                break
        return found


def _shared_path(parameters: Collection[str]) -> str:
    """The longest module path that all parameters share."""
    paths = [module_path(name).split(".") for name in parameters]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def find_blocks(program: Program, operators: Mapping[str, Operator]) -> dict[str, Block]:
    """The residual branches that can be bypassed, in the order of the program."""
    return _Finder(program, operators).find()


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


def bypass(graph: Graph, analysis: Analysis, names: Collection[str]) -> Graph:
    """A copy in which the branches of the named blocks are gone and their additions pass the skip on.

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
        addition.replace_all_uses_with(addition.all_input_nodes[at])
        fx.erase_node(addition)
    sweep(fx)
    drop_unread(result.module)
    fx.lint()
    result.module.recompile()
    return result

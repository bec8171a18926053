"""Which operators a precision plan speaks of, checked by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from planish import registry
from planish.errors import PlanError, UnknownName
from planish.graph.graph import Analysis, Graph
from planish.graph.parts import parts_of
from planish.plan import FULL_PRECISION
from planish.quantize.contract import Scheme, scheme_named

_NO_GRU = "no runtime has an int8 kernel of torch's GRU, which resets after the product; take int8-weights"
_RECURRENT = {
    ("lstm", "static"): "planish writes no LSTM with ranges that are fixed beforehand; take int8-dynamic or int8-weights",
    **{("gru", activations): _NO_GRU for activations in ("static", "dynamic")},
}
"""(kind, activations of a scheme) -> why it has no form there."""


def chosen_nodes(analysis: Analysis, precisions: Mapping[str, str]) -> dict[str, tuple[str, Scheme]]:
    """Operator name -> (fx node name, scheme), in the order of the program, of the operators that leave fp32.

    Raises:
        UnknownName: an operator that the analysis has not.
        PlanError: a scheme that nobody registered.
    """
    for name, scheme in precisions.items():
        if name not in analysis.operators:
            raise UnknownName("operator", name, analysis.operators)
        if scheme != FULL_PRECISION and scheme not in registry.names("scheme"):
            known = ", ".join([FULL_PRECISION, *registry.names("scheme")])
            raise PlanError(f"precisions: the scheme of {name!r} must be one of {known}; got {str(scheme)[:40]!r}")
    wanted = {name: scheme for name, scheme in precisions.items() if scheme != FULL_PRECISION}
    return {name: (found.node, scheme_named(wanted[name])) for name, found in analysis.operators.items() if name in wanted}


def everywhere(graph: Graph, analysis: Analysis, scheme: Scheme) -> dict[str, str]:
    """The precisions that put every operator that has a form in a scheme into it."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    return {name: scheme.name for name, found in analysis.operators.items() if not unsupported(nodes[found.node], scheme)}


def computes_in_int8(scheme: str) -> bool:
    """Whether operators of a scheme multiply integers; `scheme` may also be "fp32", "bf16" or "removed"."""
    return scheme in registry.names("scheme") and scheme_named(scheme).activations != "float"


def unsupported(node: Node, scheme: Scheme) -> str:
    """Why an operator has no form in a scheme, or "" where it has one."""
    parts = parts_of(node)
    if isinstance(parts, str):
        return parts
    if parts.kind not in scheme.kinds:
        return _RECURRENT.get((parts.kind, scheme.activations), f"{parts.kind} has no form in {scheme.name}")
    return "" if parts.weight is not None or scheme.activations == "static" else f"it has no weight, which {scheme.name} is about"
